"""Whole runs with the real vLLM: the same rollouts in every layout; a resumed run that equals the unbroken one."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_opsd.reliability.run_dir import RunDir

from . import runs
from .command_line import ARITHMETIC, ROOT, python, write_problems
from .runs import assert_equal_runs, tokens
from .tiny import write_model

QUICK = {
    "evaluate.interval": "0",
    "train.global_batch_size": "16",
    "train.micro_batch_size": "8",
    "rollout.samples_per_prompt": "2",
    "logging.rollouts_interval": "1",
    "logging.tensorboard": "false",
    "rollout.kv_cache_gib": "0.1",
}
UNSAVED = {"checkpoint.export_hf": "false", "checkpoint.save_interval": "0"}
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
EP = "parallel.expert_model_parallel_size"
VLLM_TP = "rollout.tensor_model_parallel_size"


def numbers(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what two layouts need not share."""
    metrics = RunDir(run_dir).repeatable_metrics()
    return [{name: value for name, value in line.items() if name != "padding_share"} for line in metrics]


def train(run_dir: Path, ranks: int, **overrides: str) -> None:
    data = run_dir.parent / "data"
    files = {"data.path": str(data / "train.jsonl"), "evaluate.data.path": str(data / "test.jsonl")}
    runs.train(run_dir, ranks, QUICK | files | overrides)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at TP2 with two vLLM engines, saved after two and four."""
    folder = tmp_path_factory.mktemp("runs")
    write_problems(folder / "data")
    train(folder / "unbroken", 2, **{"train.steps": "4", "checkpoint.save_interval": "2"})
    return folder / "unbroken"


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(unbroken: Path) -> None:
    run_dir = unbroken.with_name("resumed")
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_000004")
    (run_dir / "checkpoints" / "step_000003").mkdir()  # no progress.json: not complete, so not taken
    train(run_dir, 2, **{"checkpoint.resume": "auto", "train.steps": "4", "checkpoint.save_interval": "2"})
    assert_equal_runs(run_dir, unbroken)
    assert tokens(run_dir, 4) == tokens(unbroken, 4)


def test_a_checkpoint_converts_to_what_the_run_exports(unbroken: Path) -> None:
    """TP2's, with all optimizer states beside the weights; configuration and tokenizer from the run's model."""
    out = unbroken.with_name("converted")
    arguments = ("--megatron", unbroken / "checkpoints" / "step_000004", "--hf", out, "--verify")
    python(ROOT / "tools" / "convert_megatron_to_hf.py", *arguments)
    weights, wanted = (load_file(path / "model.safetensors") for path in (out, unbroken / "hf"))
    assert weights.keys() == wanted.keys()
    assert all(weights[name].dtype == wanted[name].dtype for name in wanted)
    assert all((weights[name] == wanted[name]).all() for name in wanted)
    for file in (unbroken / "hf").iterdir():
        assert file.suffix == ".safetensors" or (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("name", "ranks", "layout"), [("one", 1, {TP: "1"}), ("pp2_vllm_tp2", 2, {TP: "1", PP: "2", VLLM_TP: "2"})]
)
def test_another_layout_takes_the_checkpoint_on(unbroken: Path, name: str, ranks: int, layout: dict[str, str]) -> None:
    """The same rollouts token for token, the same losses and gradients, from a checkpoint that TP2 wrote."""
    run_dir = unbroken.with_name(name)
    resume = {"checkpoint.resume": str(unbroken / "checkpoints" / "step_000002"), "train.steps": "4"}
    train(run_dir, ranks, **UNSAVED, **resume, **layout)
    assert tokens(run_dir, 3) == tokens(unbroken, 3)
    for line, wanted in zip(numbers(run_dir), numbers(unbroken)[2:], strict=True):
        assert line == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tp2_dp2", {TP: "2"}),
        ("tp2_pp2", {TP: "2", PP: "2", VLLM_TP: "2", "parallel.sequence_parallel": "true"}),
    ],
)
def test_four_ranks_take_the_first_step_of_two(unbroken: Path, name: str, layout: dict[str, str]) -> None:
    """From the start too: the same rollouts and gradients (three layers on two pipeline stages)."""
    run_dir = unbroken.with_name(name)
    train(run_dir, 4, **UNSAVED, **layout, **{"train.steps": "1"})
    assert tokens(run_dir, 1) == tokens(unbroken, 1)
    assert numbers(run_dir)[0] == pytest.approx(numbers(unbroken)[0], rel=1e-4, abs=1e-6)


def write_arithmetic_model(path: Path, family: str) -> Path:
    """Random weights with the arithmetic example's tokenizer and a head of their own."""
    write_model(path, family, tied=False, vocab_size=512, max_position_embeddings=1024)
    for file in (ARITHMETIC / "base").iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, path)
    return path


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_train_alike_in_every_layout(unbroken: Path, ranks: int) -> None:
    """Two steps with the experts over two ranks; then one rank with all, and another layout from a checkpoint on.

    The refit is checked on the way: vLLM's log-probs are Megatron's, after the first refit and after an update.
    """
    folder = unbroken.parent
    common = {"model.path": str(folder / "experts"), "train.steps": "2", "optim.warmup_steps": "0", TP: "1"}
    wanted = folder / "ep2"
    if not wanted.exists():
        write_arithmetic_model(folder / "experts", "qwen3_moe")
        train(wanted, 2, **common, **{EP: "2", "checkpoint.save_interval": "1"})
    if ranks == 1:
        run_dir = folder / "ep1"
        train(run_dir, 1, **common, **{"checkpoint.save_interval": "0"})
    else:
        run_dir = folder / "tp2_ep2"
        layout = {TP: "2", EP: "2", VLLM_TP: "2", "parallel.sequence_parallel": "true"}
        resume = {"checkpoint.resume": str(wanted / "checkpoints" / "step_000001"), "checkpoint.save_interval": "0"}
        train(run_dir, 2, **common | layout | resume)
    for line, other in zip(numbers(run_dir), numbers(wanted)[-len(numbers(run_dir)) :], strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
        assert tokens(run_dir, line["step"]) == tokens(wanted, line["step"])
        assert line["refit_logprob_gap"] < 2e-6
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run_dir, wanted))
    assert weights.keys() == others.keys() == load_file(folder / "experts" / "model.safetensors").keys()
    assert all((weights[name] - others[name]).norm() < 1e-4 * others[name].norm() for name in others)


def test_bfloat16_and_an_untied_head(unbroken: Path) -> None:
    """A model of random weights: Megatron's and vLLM's bfloat16 agree as well as the dtype lets them."""
    folder = unbroken.parent
    model = write_arithmetic_model(folder / "untied", "qwen3")
    changes = {"model.path": str(model), "model.dtype": "bfloat16", "parallel.sequence_parallel": "true"}
    train(folder / "bfloat16", 2, **UNSAVED, **changes, **{"train.steps": "2", "optim.warmup_steps": "0"})
    for line in numbers(folder / "bfloat16"):
        assert 0 < line["refit_logprob_gap"] < 0.02
        assert line["grad_norm"] > 0
