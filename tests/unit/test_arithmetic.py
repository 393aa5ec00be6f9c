"""The arithmetic example: its problems, and the small Qwen3 that is committed with it."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_opsd.data.grading import extract_answer, is_correct
from megatron_opsd.data.prompts import PromptBuilder

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "arithmetic"
BASE = EXAMPLE / "base"


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import problems

    return problems


def test_solutions_are_worked_column_by_column(problems: ModuleType) -> None:
    example = problems.as_example(problems.Addition(347, 285))
    assert example.problem == "Compute 347+285."
    assert example.solution == r"7+5+0=12. 4+8+1=13. 3+2+1=6. The answer is \boxed{632}."
    assert example.answer == "632"


@pytest.mark.parametrize(("left", "right", "carries"), [(123, 456, 0), (347, 285, 2), (999, 999, 3), (500, 500, 1)])
def test_carries_are_counted(problems: ModuleType, left: int, right: int, carries: int) -> None:
    assert problems.as_example(problems.Addition(left, right)).difficulty == carries


def test_solutions_are_right(problems: ModuleType) -> None:
    for problem in [*problems.draw_distinct(500, 1, held_out=False), problems.Addition(999, 999)]:
        example = problems.as_example(problem)
        assert is_correct(example.solution, example.answer, "exact")
        for left, right, carry, total in re.findall(r"(\d)\+(\d)\+(\d)=(\d+)\.", example.solution):
            assert int(left) + int(right) + int(carry) == int(total)


def test_a_slip_forgets_carries_and_nothing_else(problems: ModuleType) -> None:
    rng = random.Random(0)
    assert extract_answer(problems.work_out(problems.Addition(347, 285), rng, slip=1.0)) == "522"
    assert extract_answer(problems.work_out(problems.Addition(123, 456), rng, slip=1.0)) == "579"
    right = [problems.work_out(problems.Addition(347, 205), rng, slip=0.7).endswith("{552}.") for _ in range(1000)]
    assert 0.25 < sum(right) / 1000 < 0.35


def test_one_problem_in_ten_is_held_out_in_both_orders(problems: ModuleType) -> None:
    rng = random.Random(0)
    drawn = [problems.Addition(rng.randint(100, 999), rng.randint(100, 999)) for _ in range(20000)]
    held_out = [problems.is_held_out(problem) for problem in drawn]
    assert 0.09 < sum(held_out) / len(drawn) < 0.11
    assert held_out == [problems.is_held_out(problems.Addition(right, left)) for left, right in drawn]


def test_the_script_writes_disjoint_files_that_the_seed_decides(tmp_path: Path, problems: ModuleType) -> None:
    for name in ("a", "b"):
        command = [sys.executable, EXAMPLE / "problems.py", "--out", tmp_path / name]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    sides = {}
    for name in ("train.jsonl", "test.jsonl"):
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert all(set(row) == {"problem", "solution", "answer", "carries"} for row in rows)
        sides[name] = {frozenset(re.findall(r"\d+", row["problem"])) for row in rows}
        assert len({row["problem"] for row in rows}) == len(rows) == {"train.jsonl": 4096, "test.jsonl": 500}[name]
    assert not sides["train.jsonl"] & sides["test.jsonl"]


def test_committed_base_is_the_tiny_qwen3() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    config = model.config
    assert config.model_type == "qwen3"
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 3, 384)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    assert config.vocab_size == 512
    assert config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 5e6


def test_committed_tokenizer_speaks_as_qwen3_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    generation = GenerationConfig.from_pretrained(BASE)
    assert tokenizer.eos_token_id == generation.eos_token_id == 2
    assert tokenizer.pad_token_id == generation.pad_token_id == 0
    assert len(tokenizer.encode("123456789")) == 9
    assert tokenizer.decode(tokenizer.encode("Ünïcode {x}\n")) == "Ünïcode {x}\n"
    turn = [{"role": "user", "content": "Hi"}]
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    def render(**switches: bool) -> object:
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **switches)

    assert render() == render(enable_thinking=True) == opening
    assert render(enable_thinking=False) == opening + "<think>\n\n</think>\n\n"


def test_committed_base_adds_when_shown_the_solution_and_mostly_fails_alone(problems: ModuleType) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    prompts = PromptBuilder(tokenizer, teacher_thinking=False)
    examples = [problems.as_example(problem) for problem in problems.draw_distinct(64, 0, held_out=True)]
    right = {}
    for render in (prompts.student, prompts.teacher):
        inputs = tokenizer.pad({"input_ids": [render(e) for e in examples]}, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        graded = [is_correct(text, str(e.answer), "exact") for text, e in zip(texts, examples, strict=True)]
        right[render.__name__] = sum(graded) / len(graded)
    assert 0.15 < right["student"] < 0.55
    assert right["teacher"] > 0.9
