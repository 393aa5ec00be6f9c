"""Every method with every teacher and loss that makes sense: it trains, and a resumed run is the unbroken one."""

import shutil
import signal
from pathlib import Path

import pytest

from megatron_opsd import cli, trainer
from megatron_opsd.model import parallel
from megatron_opsd.reliability.run_dir import RunDir, read_jsonl

from .command_line import arguments, write_problems
from .engine import TransformersEngine
from .harness import run_distributed
from .runs import assert_equal_runs, outcome, start, tokens

SETTINGS = {
    "evaluate.interval": "0",
    "train.steps": "2",
    "train.global_batch_size": "8",
    "train.micro_batch_size": "4",
    "rollout.samples_per_prompt": "2",
    "checkpoint.save_interval": "1",
    "checkpoint.keep_last": "0",
    "logging.rollouts_interval": "1",
    "logging.tensorboard": "false",
    "optim.warmup_steps": "0",
}
SFT = {"method.kind": "sft", "rollout.samples_per_prompt": "1"}
GRPO = {"method.kind": "grpo", "rollout.samples_per_prompt": "4"}
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
    "opsd-sibling": {"method.context": "sibling", "rollout.samples_per_prompt": "4", "train.steps": "3"},
    "opsd-sibling-skip": {"method.context": "sibling", "method.no_sibling": "skip", "rollout.samples_per_prompt": "4"},
    "opsd-weighted": {"objective.position_weights": "rising", "objective.entropy_share": "0.5", "train.steps": "3"},
    "opsd-curriculum": {"train.curriculum.window": "0.5", "train.curriculum.accuracy": "0.0", "train.steps": "7"},
    "opsd-by-difficulty": {"train.curriculum.window": "0.2", "data.difficulty_column": "carries"},
    "grpo": GRPO,
    "grpo-constant": GRPO | {"method.scale_by_std": "false", "objective.normalization": "constant"},
    "grpo-dropped": GRPO | {"method.drop_groups_without_signal": "true", "objective.importance_cap": "2.0"},
    "grpo-no-signal": GRPO | {"rollout.max_response_tokens": "2"},
    "star": {"method.kind": "star"},
    "star-alone": {"method.kind": "star", "method.rationalize": "false"},
    "sft": SFT,
    "sft-evaluated": SFT | {"evaluate.interval": "1", "evaluate.limit": "8"},
    "distill": {"method.kind": "distill", "evaluate.interval": "1", "evaluate.limit": "8"},
    "distill-ema": {"method.kind": "distill", "teacher.kind": "ema"},
    "distill-data": SFT | {"method.kind": "distill", "method.responses": "data"},
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
    run_distributed(all_runs, 2, str(folder), write_problems(folder / "data", rows=64), timeout=900)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_trains_and_resumes_bit_for_bit(folder: Path, name: str) -> None:
    run_dir, resumed = folder / name, folder / name / "resumed"
    first, *others = RunDir(run_dir).repeatable_metrics()
    assert RunDir(resumed).repeatable_metrics() == others
    assert tokens(resumed, 2) == tokens(run_dir, 2)
    shutil.copy(run_dir / "metrics.jsonl", resumed / "metrics.jsonl")
    assert_equal_runs(resumed, run_dir)
    for line in (first, *others):
        # A teacher that sees what the student sees has nothing to teach; nor has a group of equal rewards.
        signal = name != "opsd-nothing" and not (name.startswith("grpo") and line["groups_without_signal"] == 1)
        assert (line["grad_norm"] > 0) == (signal and line["samples"] > 0)


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
    by_grades = {"accuracy", "groups_without_signal"}
    assert opsd - sft == of_the_teacher | {"divergence_end_of_turn", "refit_logprob_gap"} | by_grades


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


def test_groups(folder: Path) -> None:
    """Advantages by hand; groups without signal are dropped where that is asked for."""
    for name in ("grpo", "grpo-constant", "grpo-dropped", "grpo-no-signal"):
        with_signal = 0
        for line in RunDir(folder / name).repeatable_metrics():
            records = read_jsonl(folder / name / "rollouts" / f"step_{line['step']:06d}.jsonl")
            right = [[record["grade"] == "right" for record in records[i : i + 4]] for i in (0, 4)]
            signals = [0 < sum(group) < 4 for group in right]
            assert line["groups_without_signal"] == 1 - sum(signals) / 2
            assert line["accuracy"] == sum(map(sum, right)) / 8
            assert line["samples"] == (4 * sum(signals) if name == "grpo-dropped" else 8)
            with_signal += sum(signals)
        assert (with_signal > 0) == (name != "grpo-no-signal")
    texts = [event.get("text", "") for event in read_jsonl(folder / "grpo-no-signal" / "events.jsonl")]
    assert sum("no gradient: in each group" in text for text in texts) == 2


def test_star_learns_from_right_answers_of_both_kinds(folder: Path) -> None:
    for name in ("star", "star-alone"):
        for line in RunDir(folder / name).repeatable_metrics():
            records = read_jsonl(folder / name / "rollouts" / f"step_{line['step']:06d}.jsonl")
            alone, in_sight = ([x for x in records if x["solution_in_sight"] == sight] for sight in (False, True))
            failed = [x for x in alone if x["grade"] != "right"]
            assert [x["index"] for x in in_sight] == ([x["index"] for x in failed] if name == "star" else [])
            right = [x for x in records if x["grade"] == "right"]
            assert line["samples"] == len(right)
            assert line["tokens"] == sum(len(x["token_ids"]) for x in right)
            assert line["accuracy"] == 1 - len(failed) / len(alone)
            assert ("accuracy_in_sight" in line) == bool(in_sight)
            assert line.get("accuracy_in_sight", 1) > 0.7  # the base can copy a solution
            assert line["tokens_written"] == sum(len(x["token_ids"]) for x in records)


def test_siblings_are_other_right_answers(folder: Path) -> None:
    for line in RunDir(folder / "opsd-sibling-skip").repeatable_metrics():
        records = read_jsonl(folder / "opsd-sibling-skip" / "rollouts" / f"step_{line['step']:06d}.jsonl")
        groups = [records[:4], records[4:]]
        right = [[x["token_ids"] for x in group if x["grade"] == "right"] for group in groups]
        has_sibling = [
            any(ids != x["token_ids"] for ids in others)
            for group, others in zip(groups, right, strict=True)
            for x in group
        ]
        assert line["samples"] == sum(has_sibling)


def test_the_teacher_writes_once(folder: Path) -> None:
    """Its responses are kept. A run that goes on in another folder writes those of its own steps, the same ones."""
    run_dir = folder / "distill"
    settings, *records = read_jsonl(run_dir / "written.jsonl")
    assert settings["rollout.samples_per_prompt"] == 2
    rollouts = [read_jsonl(run_dir / "rollouts" / f"step_{step:06d}.jsonl") for step in (1, 2)]
    written = {x["problem"]: [y["token_ids"] for y in records if y["problem"] == x["problem"]] for x in records}
    assert [len(responses) for responses in written.values()] == [2] * 8  # four problems a step
    for step, problems in zip(rollouts, ([*written][:4], [*written][4:]), strict=True):
        assert [x["token_ids"] for x in step] == [ids for problem in problems for ids in written[problem]]
    assert sum(x["grade"] == "right" for x in records) > 12  # the base can copy a solution
    assert read_jsonl(run_dir / "resumed" / "written.jsonl") == [settings, *records[8:]]
    for line in RunDir(run_dir).repeatable_metrics():
        assert "refit_logprob_gap" not in line
        assert "accuracy" not in line
        assert line["accuracy_in_sight"] > 0.6
        assert line["tokens_written"] == 0


def test_a_curriculum_widens(folder: Path) -> None:
    lines = RunDir(folder / "opsd-curriculum").repeatable_metrics()
    assert [line["window"] for line in lines] == [0.5] * 4 + [0.75] * 3
    records = read_jsonl(folder / "opsd-by-difficulty" / "rollouts" / "step_000001.jsonl")
    rows = read_jsonl(folder / "data" / "train.jsonl")
    easiest = sorted(range(64), key=lambda i: (rows[i]["carries"], i))[:13]
    assert {x["index"] for x in records} <= set(easiest)


def test_half_of_the_tokens_are_kept_after_the_first_step(folder: Path) -> None:
    first, *others = RunDir(folder / "opsd-weighted").repeatable_metrics()
    assert first["kept_share"] == 1
    assert all(0.2 < line["kept_share"] < 0.9 for line in others)


def test_the_importance_factor_is_near_one_after_a_refit(folder: Path) -> None:
    """The engine holds the same weights, so the factor changes little."""
    plain, weighed = (
        RunDir(folder / name).repeatable_metrics()[0]["loss"]
        for name in ("opsd-sampled_token-frozen", "opsd-importance")
    )
    assert weighed != plain
    assert weighed == pytest.approx(plain, rel=1e-3)


def test_killed_and_interrupted_while_the_teacher_writes(folder: Path, tmp_path: Path) -> None:
    """What is written is kept; the same command goes on, and ends as the unbroken run did."""
    settings = SETTINGS | CASES["distill"] | write_problems(folder / "data", rows=64)
    settings |= {"checkpoint.resume": "auto", "rollout.max_num_seqs": "2"}  # few problems between two writes
    written = tmp_path / "run" / "written.jsonl"

    with start(tmp_path / "run", settings, "transformers") as run:
        run.wait_until(lambda: len(read_jsonl(written)) > 4)
        run.signal(signal.SIGKILL, rank=1)
        assert any(run.finish()[0])
    with written.open("a") as file:
        file.write('{"problem": "half of a')
    kept = read_jsonl(written)
    with start(tmp_path / "run", settings, "transformers") as run:
        run.wait_until(lambda: len(read_jsonl(written)) > len(kept))
        run.signal(signal.SIGTERM)
        statuses, output = run.finish()
        assert statuses == [0, 0], output
        assert outcome(tmp_path / "run") == "interrupted"
        assert not run.steps()
    with start(tmp_path / "run", settings, "transformers") as run:
        statuses, output = run.finish()
        assert statuses == [0, 0], output
    assert read_jsonl(written)[: len(kept)] == kept
    assert read_jsonl(written) == read_jsonl(folder / "distill" / "written.jsonl")
    assert_equal_runs(tmp_path / "run", folder / "distill")
