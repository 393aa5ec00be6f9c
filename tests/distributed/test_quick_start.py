"""The arithmetic example as a user runs it: torchrun, real Megatron-Core at TP2, real vLLM, and what they leave.

Ten steps of its forty: most of the gain comes early.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opsd.config_file import load_config
from megatron_opsd.data.batch import Batch, Sample, split
from megatron_opsd.data.datasets import read_examples
from megatron_opsd.data.prompts import build_prompts
from megatron_opsd.evaluate import grade
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import build_model
from megatron_opsd.model.teacher import FrozenTeacher
from megatron_opsd.plan.preflight import max_model_len
from megatron_opsd.reliability.run_dir import read_jsonl
from megatron_opsd.rollout import build_engine
from megatron_opsd.rollout.engine import Sampling
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable, Shard

from .command_line import ARITHMETIC, Torchrun, arguments, python, write_problems
from .harness import run_distributed
from .runs import opsd

STEPS = 10

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


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The example's configuration with every file in a folder of this test."""
    folder = tmp_path_factory.mktemp("arithmetic")
    few = {"train.steps": str(STEPS), "checkpoint.save_interval": "5"}
    return write_problems(folder / "data") | few | {"logging.run_dir": str(folder / "opsd")}


@pytest.fixture(scope="module")
def run_dir(overrides: dict[str, str]) -> Path:
    """The run directory of one training run."""
    with Torchrun(2, "-m", "megatron_opsd", *arguments("train", overrides)) as run:
        assert run.finish(timeout=400) == [0], run.output()
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
    expected = {"config.toml", "metrics.jsonl", "evaluations.jsonl", "events.jsonl", "tensorboard"}
    expected |= {"logs/train_rank_0000.log", "logs/train_rank_0001.log", f"rollouts/evaluation_{STEPS:06d}.jsonl"}
    expected |= {"checkpoints/step_000005", f"checkpoints/step_{STEPS:06d}"}
    expected |= {f"hf/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")}
    assert expected <= files
    assert load_config(str(run_dir / "config.toml"), {}).train.steps == STEPS


def three_readers(run_dir: str, overrides: dict[str, str]) -> None:
    """vLLM, transformers and Megatron read the exported directory; one process holds all three."""
    settings = overrides | {"model.path": f"{run_dir}/hf", "parallel.tensor_model_parallel_size": "1"}
    config = load_config(str(ARITHMETIC / "opsd.toml"), settings)
    layout = parallel.initialize(config.parallel, seed=0)
    prompts = build_prompts(config)
    assert config.evaluate.data
    examples = read_examples(config.evaluate.data, prompts.tokenizer, "evaluate.data")[:64]
    ids = [prompts.student(example) for example in examples]
    limit = config.rollout.max_response_tokens

    table, reader = NameTable(read_architecture(config.model.path)), HFReader(config.model.path)
    engine = build_engine(config, max_model_len(config, prompts))
    engine.update_weights(((name, reader.read(name)) for name in table.hf_tensors()), version=0)
    rollouts = engine.generate(ids, Sampling(limit, temperature=0.0), [0] * len(ids))
    assert sum(grade(rollouts, examples, prompts.tokenizer, "exact")) >= 0.9 * len(examples)

    # Three digits and three digits: all prompts are equally long and need no padding.
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    prompt_ids = torch.tensor(ids)  # [64, s]
    answers = model.generate(prompt_ids, max_new_tokens=limit, do_sample=False)[:, prompt_ids.shape[1] :].tolist()
    for rollout, answer in zip(rollouts, answers, strict=True):
        assert rollout.token_ids == answer[: answer.index(prompts.tokenizer.eos_token_id) + 1]

    megatron = build_model(table.arch, config.model, config.parallel, layout.pg_collection)
    load_hf(megatron, reader, table, Shard())
    batch = Batch([Sample(prompt, prompt, rollout) for prompt, rollout in zip(ids, rollouts, strict=True)])
    (microbatch,) = split(batch, batch.assign(64, 1), 0, parallel.device())
    (hidden,) = FrozenTeacher(megatron, "resident").score([microbatch])
    logits = (hidden @ megatron.head_weight().T)[:, : table.arch.vocab_size]  # [n, v]
    assert (logits.argmax(1) == microbatch.response_ids).all()
    logprobs = logits.log_softmax(1).gather(1, microbatch.response_ids[:, None])[:, 0]
    assert (logprobs - microbatch.rollout_logprobs).abs().max() < 1e-4
    engine.close()


def test_transformers_vllm_and_megatron_read_the_exported_model_alike(run_dir: Path, overrides: dict[str, str]) -> None:
    """The same greedy answers to 64 held-out problems, nearly all right; Megatron agrees token for token."""
    run_distributed(three_readers, 1, str(run_dir), overrides)


def test_evaluate_reads_any_directory(run_dir: Path, overrides: dict[str, str], tmp_path: Path) -> None:
    """`opsd evaluate` finds in the exported model what the run found in its student."""
    settings = overrides | {"model.path": str(run_dir / "hf"), "evaluate.limit": "100", "evaluate.samples": "2"}
    command = [*arguments("evaluate", settings), "--out", str(tmp_path / "responses.jsonl")]
    printed = run_distributed(opsd, 1, command)
    records = read_jsonl(tmp_path / "responses.jsonl")
    trained = read_jsonl(run_dir / "rollouts" / f"evaluation_{STEPS:06d}.jsonl")
    assert [record["response"] for record in records[:100]] == [record["response"] for record in trained[:100]]
    assert [record["sampling"] for record in records] == ["greedy"] * 100 + ["sampled"] * 200
    sampled = [record["correct"] for record in records[100:]]
    assert f"average {sum(sampled) / 200:.3f}" in printed


def test_report_prints_a_table_and_draws_a_figure(run_dir: Path) -> None:
    output = python(ARITHMETIC / "report.py", run_dir)
    for evaluation in (read_jsonl(run_dir / "evaluations.jsonl")[i] for i in (0, -1)):
        assert f"{evaluation['greedy']:.1%}" in output
    assert (run_dir / "accuracy.png").read_bytes().startswith(b"\x89PNG")
