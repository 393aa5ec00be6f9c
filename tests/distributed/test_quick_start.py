"""The arithmetic example as a user runs it: real Megatron-Core at TP2, real vLLM, 40 steps, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opsd.config import load_config
from megatron_opsd.data import read_examples
from megatron_opsd.prompts import build_prompts

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "arithmetic"
STEPS = 40

# The keys that the design promises for every step.
METRICS = {
    "step",
    "loss",
    "divergence",
    "clip_fraction",
    "logprob_student",
    "logprob_teacher",
    "agreement",
    "grad_norm",
    "lr",
    "response_length",
    "entropy_student",
    "entropy_teacher",
    "tokens",
    "weight_version",
    "refit_logprob_gap",
    "accuracy",
    "memory_peak_gib",
} | {f"seconds_{phase}" for phase in ("rollout", "teacher", "student", "optimizer", "refit", "total")}


def run(*arguments: object) -> str:
    """Run Python with these arguments from the root of the repository; its output, which also explains a failure."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    return process.stdout


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The example's configuration with every file in a folder of this test."""
    folder = tmp_path_factory.mktemp("arithmetic")
    run(EXAMPLE / "problems.py", "--out", folder / "data")
    return {
        "data.path": str(folder / "data" / "train.jsonl"),
        "evaluate.data.path": str(folder / "data" / "test.jsonl"),
        "logging.run_dir": str(folder / "opsd"),
    }


def flags(overrides: dict[str, str]) -> list[str]:
    return [part for name, value in overrides.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def run_dir(overrides: dict[str, str]) -> Path:
    """The run directory of one training run."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*launcher, "-m", "megatron_opsd", "train", EXAMPLE / "opsd.toml", *flags(overrides))
    return Path(overrides["logging.run_dir"])


def test_held_out_accuracy_rises(run_dir: Path) -> None:
    evaluations = read_jsonl(run_dir / "evaluations.jsonl")
    before, after = evaluations[0], evaluations[-1]
    assert (before["step"], after["step"]) == (0, STEPS)
    assert 0.25 <= before["greedy"] <= 0.45
    assert after["greedy"] - before["greedy"] >= 0.40
    assert after["average"] - before["average"] >= 0.25


def test_every_step_is_recorded_once_and_in_full(run_dir: Path) -> None:
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [step["step"] for step in metrics] == list(range(1, STEPS + 1))
    assert all(step.keys() >= METRICS for step in metrics)
    assert all(step["weight_version"] == step["step"] - 1 for step in metrics)


def test_vllm_and_megatron_agree_on_every_rollout(run_dir: Path) -> None:
    gaps = [step["refit_logprob_gap"] for step in read_jsonl(run_dir / "metrics.jsonl")]
    assert max(gaps) < 1e-4


def test_run_directory_is_complete(run_dir: Path) -> None:
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    expected = {"config.toml", "metrics.jsonl", "evaluations.jsonl", "tensorboard"}
    expected |= {"logs/rank_0000.log", "logs/rank_0001.log", f"rollouts/evaluation_{STEPS:06d}.jsonl"}
    expected |= {"checkpoints/step_000020", f"checkpoints/step_{STEPS:06d}"}
    expected |= {f"hf/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")}
    assert expected <= files
    assert load_config(str(run_dir / "config.toml"), {}).train.steps == STEPS


def test_transformers_and_vllm_read_the_exported_model_alike(
    run_dir: Path, overrides: dict[str, str], tmp_path: Path
) -> None:
    """Both give the same greedy answers to 64 held-out problems, and nearly all are right."""
    settings = overrides | {"model.path": str(run_dir / "hf"), "evaluate.limit": "64"}
    records = tmp_path / "responses.jsonl"
    run("-m", "megatron_opsd", "evaluate", EXAMPLE / "opsd.toml", *flags(settings), "--out", records)
    greedy = [record for record in read_jsonl(records) if record["sampling"] == "greedy"]

    config = load_config(str(EXAMPLE / "opsd.toml"), settings)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32)
    prompts = build_prompts(config)
    assert config.evaluate.data
    examples = read_examples(config.evaluate.data, tokenizer, "evaluate.data")[:64]
    assert [record["problem"] for record in greedy] == [example.problem for example in examples]
    # Three digits and three digits: all prompts are equally long and need no padding.
    ids = torch.tensor([prompts.student(example) for example in examples])  # [64, s]
    answers = model.generate(ids, max_new_tokens=config.rollout.max_response_tokens, do_sample=False)[:, ids.shape[1] :]
    for record, answer in zip(greedy, answers.tolist(), strict=True):
        length = answer.index(tokenizer.eos_token_id) + 1
        expected = tokenizer.decode(answer[:length], skip_special_tokens=True)
        assert (record["response"], record["tokens"]) == (expected, length)
    assert sum(record["correct"] for record in greedy) >= 0.9 * len(greedy)


def test_report_prints_a_table_and_draws_a_figure(run_dir: Path) -> None:
    output = run(EXAMPLE / "report.py", run_dir)
    for evaluation in (read_jsonl(run_dir / "evaluations.jsonl")[i] for i in (0, -1)):
        assert f"{evaluation['greedy']:.1%}" in output
    assert (run_dir / "accuracy.png").read_bytes().startswith(b"\x89PNG")
