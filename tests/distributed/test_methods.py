"""Every method with every teacher and loss that makes sense: it trains, and a resumed run is the unbroken one."""

import shutil
from pathlib import Path

import pytest

from megatron_opsd import cli, trainer
from megatron_opsd.model import parallel
from megatron_opsd.reliability.run_dir import RunDir, read_jsonl

from .command_line import arguments, write_problems
from .engine import TransformersEngine
from .harness import run_distributed
from .runs import assert_equal_runs, outcome, tokens

SETTINGS = {
    "evaluate.interval": "0",
    "train.steps": "2",
    "train.global_batch_size": "8",
    "train.micro_batch_size": "4",
    "rollout.max_response_tokens": "40",
    "rollout.samples_per_prompt": "2",
    "checkpoint.save_interval": "1",
    "logging.rollouts_interval": "1",
    "logging.tensorboard": "false",
    "optim.warmup_steps": "0",
}
SFT = {"method.kind": "sft", "rollout.samples_per_prompt": "1"}
CASES: dict[str, dict[str, str]] = {
    **{
        f"opsd-{loss}-{teacher}": {"method.loss": loss, "teacher.kind": teacher}
        for loss in ("divergence", "sampled_token")
        for teacher in ("frozen", "live", "ema")
    },
    "opsd-answer": {"method.context": "answer"},
    "opsd-shuffled": {"method.context": "shuffled"},
    "opsd-nothing": {"method.context": "nothing"},
    "opsd-right": {"method.train_on": '["right"]'},
    "opsd-importance": {"method.loss": "sampled_token", "objective.importance_cap": "2.0"},
    "sft": SFT,
    "sft-evaluated": SFT | {"evaluate.interval": "1", "evaluate.limit": "8"},
    "nothing-to-learn": {"method.train_on": '["right"]', "rollout.max_response_tokens": "2"},
}


def all_runs(folder: str, files: dict[str, str]) -> None:
    """Two steps of each case, saved after both; then again from the first step on."""
    trainer.build_engine = TransformersEngine  # type: ignore[assignment]
    parallel.finalize = lambda: None  # the next run starts in the same process groups' store
    for name, case in CASES.items():
        run_dir = Path(folder) / name
        settings = SETTINGS | files | case
        cli.main(arguments("train", settings | {"logging.run_dir": str(run_dir)}))
        resumed = {"logging.run_dir": str(run_dir / "resumed"), "checkpoint.save_interval": "0"}
        first = str(run_dir / "checkpoints" / "step_000001")
        cli.main(arguments("train", settings | resumed | {"checkpoint.resume": first}))
    past = {"checkpoint.resume": "auto", "train.steps": "1", "checkpoint.keep_last": "1"}
    run_dir = {"logging.run_dir": str(Path(folder) / "sft")}
    cli.main(arguments("train", SETTINGS | files | SFT | past | run_dir))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    run_distributed(all_runs, 2, str(folder), write_problems(folder / "data", rows=64), timeout=600)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_trains_and_resumes_bit_for_bit(folder: Path, name: str) -> None:
    run_dir, resumed = folder / name, folder / name / "resumed"
    first, second = RunDir(run_dir).repeatable_metrics()
    assert RunDir(resumed).repeatable_metrics() == [second]
    assert tokens(resumed, 2) == tokens(run_dir, 2)
    shutil.copy(run_dir / "metrics.jsonl", resumed / "metrics.jsonl")
    assert_equal_runs(resumed, run_dir)
    if name == "nothing-to-learn":
        return
    for line in (first, second):  # a teacher that sees what the student sees has nothing to teach
        assert (line["grad_norm"] > 0) == (name != "opsd-nothing")


def test_a_run_past_its_last_step_ends_at_once(folder: Path) -> None:
    """Resumed with fewer steps than are done: nothing is trained, and nothing is removed."""
    run_dir = folder / "sft"
    assert [line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")] == [1, 2]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    assert outcome(run_dir) == "finished"


def test_what_a_method_logs(folder: Path) -> None:
    opsd, sft, answer = (
        {*read_jsonl(folder / name / "metrics.jsonl")[0]}
        for name in ("opsd-divergence-frozen", "sft", "opsd-sampled_token-live")
    )
    of_the_teacher = {"divergence", "entropy_teacher", "logprob_teacher", "agreement", "clip_fraction"}
    assert of_the_teacher <= opsd == answer
    assert opsd - sft == of_the_teacher | {"refit_logprob_gap", "accuracy"}


def test_teachers_differ_from_the_second_step_on(folder: Path) -> None:
    first, second = (
        {
            teacher: RunDir(folder / f"opsd-divergence-{teacher}").repeatable_metrics()[step]["loss"]
            for teacher in ("frozen", "live", "ema")
        }
        for step in (0, 1)
    )
    assert len(set(first.values())) == 1
    assert len(set(second.values())) == 3


def test_filters_and_batches_that_do_not_divide(folder: Path) -> None:
    """Only right answers are learned from, however many there are; none of them leaves the weights alone."""
    for line in read_jsonl(folder / "opsd-right" / "metrics.jsonl"):
        records = read_jsonl(folder / "opsd-right" / "rollouts" / f"step_{line['step']:06d}.jsonl")
        right = [record for record in records if record["grade"] == "right"]
        assert 0 < line["samples"] == len(right) < len(records)
        assert line["tokens"] == sum(len(record["token_ids"]) for record in right)
    nothing = folder / "nothing-to-learn"
    for line in read_jsonl(nothing / "metrics.jsonl"):
        assert (line["samples"], line["tokens"], line["grad_norm"], line["skipped"]) == (0, 0, 0, 0)
    warnings = [event for event in read_jsonl(nothing / "events.jsonl") if event["event"] == "warning"]
    assert "no response to learn from" in warnings[0]["text"]
    weights = [nothing / "hf", Path(__file__).parents[2] / "examples" / "arithmetic" / "base"]
    from safetensors.torch import load_file

    trained, base = (load_file(path / "model.safetensors") for path in weights)
    assert all((trained[name] == base[name]).all() for name in base)


def test_the_importance_factor_is_near_one_after_a_refit(folder: Path) -> None:
    """The engine holds the same weights, so the factor changes little."""
    plain, weighed = (
        RunDir(folder / name).repeatable_metrics()[0]["loss"]
        for name in ("opsd-sampled_token-frozen", "opsd-importance")
    )
    assert weighed != plain
    assert weighed == pytest.approx(plain, rel=1e-3)
