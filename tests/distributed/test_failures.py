"""Runs that are signalled, stopped, starved or fed bad data: each costs one clear line, and nothing is lost.

``make test`` does this with the tests' own engine; ``make test-all`` also with the real vLLM, under torchrun.
"""

import json
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_opsd.reliability.run_dir import RunDir, read_jsonl

from .command_line import ARITHMETIC, write_problems
from .runs import Run, Way, assert_equal_runs, began_after, complete, outcome, start

STEPS = 5
QUICK = {
    "train.steps": str(STEPS),
    "train.global_batch_size": "16",
    "train.micro_batch_size": "8",
    "evaluate.interval": "0",
    "logging.tensorboard": "false",
    "rollout.kv_cache_gib": "0.1",
    "rollout.max_response_tokens": "16",  # cut short, most of them: nothing here is about what they say
    "checkpoint.save_interval": "2",
    "checkpoint.keep_last": "0",
    "checkpoint.resume": "auto",
}


@dataclass(frozen=True)
class Unbroken:
    """A run of five steps, saved after two, four and five, and how others like it are started."""

    run_dir: Path
    settings: dict[str, str]
    way: Way

    def sibling(self, name: str) -> Path:
        """The directory of another run."""
        return self.run_dir.with_name(name)

    def run(self, run_dir: Path, limit_file_bytes: int | None = None, **overrides: str) -> Run:
        """Start a run like it; the names of settings have __ for the dot."""
        settings = self.settings | {name.replace("__", "."): value for name, value in overrides.items()}
        return start(run_dir, settings, self.way, limit_file_bytes)

    def complete(self, run_dir: Path) -> Run:
        """Run to the end, and compare."""
        run = complete(run_dir, self.settings, self.way)
        assert_equal_runs(run_dir, self.run_dir)
        return run

    def copy(self, name: str) -> Path:
        """The run as if it had been killed in its last step: without the last checkpoint and the exported model."""
        run_dir = self.sibling(name)
        shutil.copytree(self.run_dir, run_dir)
        shutil.rmtree(run_dir / "hf")
        shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS:06d}")
        return run_dir


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.thorough)])
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp("failures")
    settings = QUICK | write_problems(folder / "data")
    complete(folder / "unbroken", settings, request.param)
    return Unbroken(folder / "unbroken", settings, request.param)


def the_line(output: str, words: str) -> str:
    """The one line of the output that has ``words``."""
    lines = [line for line in output.splitlines() if words in line]
    assert len(lines) == 1, output
    return lines[0]


def flip_a_byte(checkpoint: Path) -> Path:
    file = max(checkpoint.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    return file


def test_a_flipped_byte_is_named_and_the_checkpoint_before_taken(unbroken: Unbroken) -> None:
    run_dir = unbroken.copy("flipped")
    file = flip_a_byte(run_dir / "checkpoints" / "step_000004")
    with unbroken.run(run_dir) as run:
        statuses, output = run.finish()
    assert not any(statuses), output
    assert outcome(run_dir) == "finished"
    assert "going on from the checkpoint before" in the_line(output, f"{file} is damaged (checksum ")
    assert began_after(run) == 2
    assert_equal_runs(run_dir, unbroken.run_dir)

    shutil.rmtree(run_dir / "hf")  # else the run would be done
    for name in ("step_000002", "step_000004", "step_000005"):  # all of them: nothing to go on from
        flip_a_byte(run_dir / "checkpoints" / name)
    with unbroken.run(run_dir) as run:
        assert any(run.finish()[0])
    with unbroken.run(run_dir, checkpoint__resume=str(run_dir / "checkpoints" / "step_000002")) as run:
        statuses, output = run.finish()
    assert any(statuses)
    assert "resume from another checkpoint" in the_line(output, "step_000002/")
    assert outcome(run_dir) == "stopped"


def test_a_changed_teacher_stops_the_run(unbroken: Unbroken) -> None:
    model = unbroken.sibling("model")
    shutil.copytree(ARITHMETIC / "base", model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    run_dir = unbroken.copy("teacher")
    with unbroken.run(run_dir, model__path=str(model)) as run:
        statuses, output = run.finish()
    assert any(statuses)
    hashes = re.findall(r"\b[0-9a-f]{16}\b", the_line(output, "was trained with the teacher"))
    assert len(set(hashes)) == 2
    assert outcome(run_dir) == "stopped"


def test_a_run_keeps_its_meaning(unbroken: Unbroken) -> None:
    """Other settings go on only where the user says so. What was given at the first start is kept."""
    run_dir = unbroken.copy("meaning")
    first = (run_dir / "config.toml").read_text()
    with unbroken.run(run_dir, objective__clip="0.3") as run:
        statuses, output = run.finish()
    assert any(statuses)
    assert "objective.clip: 0.05 -> 0.3" in the_line(output, "with other settings than this start has")
    assert run.phases() == []  # before any model
    with unbroken.run(run_dir, objective__clip="0.3", checkpoint__allow_changes="true") as run:
        statuses, output = run.finish()
    assert not any(statuses), output
    assert began_after(run) == 4
    assert "warning: changed since the checkpoint: objective.clip: 0.05 -> 0.3" in output
    assert (run_dir / "config.toml").read_text() == first
    assert "clip = 0.3" in (run_dir / "config_after_000004.toml").read_text()
    assert f'path = "{ARITHMETIC / "base"}"' in first  # from the root, whatever folder the run was started in


def test_other_data_begin_a_new_order(unbroken: Unbroken) -> None:
    run_dir, data = unbroken.copy("other_data"), unbroken.sibling("other.jsonl")
    _write(data, read_jsonl(Path(unbroken.settings["data.path"]))[:100])
    with unbroken.run(run_dir, data__path=str(data)) as run:
        statuses, output = run.finish()
    assert any(statuses)
    assert "--checkpoint.allow_changes true" in the_line(output, "cannot resume")
    with unbroken.run(run_dir, data__path=str(data), checkpoint__allow_changes="true") as run:
        statuses, output = run.finish()
    assert not any(statuses), output
    assert began_after(run) == 4


def test_a_run_past_its_goal_ends_at_once(unbroken: Unbroken) -> None:
    """Fewer steps than are done: nothing is trained, nothing deleted, and no model is loaded to find out."""
    run_dir = unbroken.sibling("done")
    shutil.copytree(unbroken.run_dir, run_dir)
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    with unbroken.run(run_dir, train__steps="1", checkpoint__keep_last="1") as run:
        statuses, output = run.finish()
    assert not any(statuses), output
    assert "train.steps = 1 is reached: 5 steps are done" in output
    assert outcome(run_dir) == "finished"
    assert run.phases() == []
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before
    assert_equal_runs(run_dir, unbroken.run_dir)

    (run_dir / "hf.step").write_text("3")  # killed before the export of a run that was made longer
    shutil.rmtree(run_dir / "hf")
    shutil.copytree(ARITHMETIC / "base", run_dir / "hf")
    run = unbroken.complete(run_dir)
    assert began_after(run) == STEPS
    assert (run_dir / "hf.step").read_text() == str(STEPS)


def test_a_second_run_in_a_living_ones_folder(unbroken: Unbroken) -> None:
    run_dir = unbroken.sibling("shared_folder")
    with unbroken.run(run_dir) as first:
        first.wait_until(lambda: first.steps() == 1)
        with unbroken.run(run_dir, train__seed="5") as second:
            statuses, output = second.finish()
        assert any(statuses)
        assert re.search(r"process \d+ on \S+ trains there", the_line(output, "opsd: logging.run_dir"))
        statuses, output = first.finish()
    assert not any(statuses), output
    assert outcome(run_dir) == "finished"
    assert not (run_dir / "lock").exists()
    assert_equal_runs(run_dir, unbroken.run_dir)


def test_a_signal_saves_and_a_second_one_leaves_at_once(unbroken: Unbroken) -> None:
    """To one rank only: the others must learn of it. The step under way is finished, for there is time."""
    run_dir = unbroken.sibling("signalled")
    with unbroken.run(run_dir) as run:
        run.wait_until(lambda: run.steps() == 3)
        run.signal(signal.SIGUSR1, rank=1)
        statuses, output = run.finish()
    assert not any(statuses), output
    assert outcome(run_dir) == "interrupted"
    done = run.steps()
    assert "--checkpoint.resume auto" in the_line(output, f"saved after step {done}")
    assert (run_dir / "checkpoints" / f"step_{done:06d}").is_dir()

    with unbroken.run(run_dir) as run:
        run.wait_until(lambda: run.phases() == ["start"])  # while the models are loaded
        run.signal(signal.SIGSTOP, rank=1)  # which keeps rank 0 from leaving
        run.signal(signal.SIGUSR1, rank=0)
        time.sleep(5.5)
        run.signal(signal.SIGUSR1, rank=0)
        run.signal(signal.SIGCONT, rank=1)
        second = time.monotonic()
        statuses, output = run.finish()
    assert time.monotonic() - second < 20
    left_at_once = 128 + signal.SIGUSR1
    assert statuses[0] == left_at_once or f"exitcode  : {left_at_once}" in output, output
    assert outcome(run_dir) == ""

    assert began_after(unbroken.complete(run_dir)) == done


@pytest.mark.parametrize("phase", ["rollout", "student"])
def test_a_step_without_time_to_end_is_given_up(phase: str, unbroken: Unbroken) -> None:
    run_dir = unbroken.sibling(f"given_up_{phase}")
    with unbroken.run(run_dir, checkpoint__signal_lead_seconds="0.1") as run:
        run.wait_until(lambda: run.phases().count(phase) == 4)
        run.signal(signal.SIGTERM if phase == "student" else signal.SIGUSR1)
        statuses, output = run.finish()
    assert not any(statuses), output
    assert outcome(run_dir) == "interrupted"
    assert "for which checkpoint.signal_lead_seconds = 0.1 leaves no room; let signals come" in output
    assert run.steps() == (3 if phase == "rollout" else 4)  # what comes after the teacher's pass is not given up
    unbroken.complete(run_dir)


def test_a_hung_rank_is_named(unbroken: Unbroken) -> None:
    run_dir = unbroken.sibling("hung")
    phases = ("rollout", "teacher", "student", "optimizer", "refit", "save")
    limits = {f"timeouts__{name}": "0.1" for name in phases}
    with unbroken.run(run_dir, **limits, train__steps="100") as run:
        run.wait_until(lambda: run.steps() == 2)
        run.signal(signal.SIGSTOP, rank=1)
        stopped = time.monotonic()
        statuses, output = run.finish()
    assert any(statuses)
    assert time.monotonic() - stopped < 60
    line = the_line(output, "opsd: the phase")
    assert re.search(r"the phase '\w+' has taken \d+ s \(timeouts\.\w+ = 0.1 minutes\)", line)
    assert re.search(r"; rank 1 no sign of life, last in \w+ at \S+:\d+", line)
    assert re.search(r"; rank 0 in \w+ at \S+\.py:\d+ \w+$", line)
    log = (run_dir / "logs" / "train_rank_0000.log").read_text()
    assert re.search(r'Thread 0x\w+.*\n(  File .*\n)*  File ".*megatron_opsd/run.py", line \d+ in run_steps', log)
    assert outcome(run_dir) == ""
    unbroken.complete(run_dir)


def test_a_full_disk_costs_checkpoints_but_not_the_run(unbroken: Unbroken) -> None:
    run_dir = unbroken.sibling("full")
    with unbroken.run(run_dir, limit_file_bytes=2000 * 1024) as run:
        statuses, output = run.finish()
    assert any(statuses)
    for step in (2, 4):
        line = the_line(output, f"the checkpoint of step {step} could not be written")
        assert re.search(r"(File too large|unexpected pos).* GiB free\); going on without it", line)
    line = the_line(output, f"opsd: {run_dir / 'checkpoints'}: the checkpoint of step {STEPS} could not be written")
    assert re.search(r"(File too large|unexpected pos).* GiB free\)", line)
    assert outcome(run_dir) == "stopped"
    assert RunDir(run_dir).repeatable_metrics() == RunDir(unbroken.run_dir).repeatable_metrics()
    assert list((run_dir / "checkpoints").iterdir()) == []  # what could not be completed is gone
    unbroken.complete(run_dir)


def test_a_loss_that_is_not_finite_changes_nothing(unbroken: Unbroken) -> None:
    """A token of one solution has broken weights, so that the teacher's answer to that problem is NaN."""
    model = write_model_with_a_broken_token(unbroken.sibling("broken_model"), "§")
    rows = read_jsonl(Path(unbroken.settings["data.path"]))[:64]
    clean, broken = unbroken.sibling("clean.jsonl"), unbroken.sibling("broken.jsonl")
    _write(clean, rows)
    _write(broken, [row | {"solution": row["solution"] + " §"} if i < 16 else row for i, row in enumerate(rows)])
    changes = {
        "model__path": str(model),
        "evaluate__data__path": str(clean),
        "data__path": str(broken),
        "train__global_batch_size": "4",
        "train__micro_batch_size": "2",
    }
    saves = {"checkpoint__save_interval": "1", "checkpoint__keep_last": "1", "checkpoint__keep_every": "4"}
    run_dir = unbroken.sibling("not_finite")
    with unbroken.run(run_dir, **changes, **saves, guards__max_skipped_steps="100", train__steps="6") as run:
        statuses, output = run.finish()
    assert not any(statuses), output
    assert outcome(run_dir) == "finished"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    metrics = RunDir(run_dir).repeatable_metrics()
    skipped = [line["step"] for line in metrics if line["skipped"]]
    assert 0 < len(skipped) < 6, output
    for line in metrics:
        assert (line["loss"] is None) == (line["step"] in skipped)
        file = run_dir / "skipped" / f"step_{line['step']:06d}.jsonl"
        assert file.exists() == (line["step"] in skipped)
    for file in (run_dir / "skipped").iterdir():
        assert any(record["index"] < 16 for record in read_jsonl(file))
    exported = load_file(run_dir / "hf" / "model.safetensors")
    assert all(value.isfinite().all() for name, value in exported.items() if name != "model.embed_tokens.weight")

    _write(broken, [row | {"solution": row["solution"] + " §"} for row in rows])
    run_dir = unbroken.sibling("never_finite")
    with unbroken.run(run_dir, **changes, guards__max_skipped_steps="1") as run:
        statuses, output = run.finish()
    assert any(statuses)
    assert "not finite for 2 steps in a row (guards.max_skipped_steps = 1)" in the_line(output, "opsd: step 2:")
    assert outcome(run_dir) == "stopped"


def test_a_collapse_warns_and_then_ends_the_run(unbroken: Unbroken) -> None:
    run_dir = unbroken.sibling("collapsed")
    bounds = {"guards__min_response_length": "46", "guards__patience": "3", "evaluate__interval": "1"}
    bounds["rollout__max_response_tokens"] = "48"  # the example's responses have about 39 tokens
    with unbroken.run(run_dir, **bounds, evaluate__limit="4", checkpoint__save_interval="1") as run:
        statuses, output = run.finish()
    assert any(statuses)
    warnings = [event["text"] for event in run.events("warning")]
    for step in (1, 2):
        (text,) = (text for text in warnings if text.startswith(f"step {step}: response_length"))
        assert f"({step} of 3 steps in a row)" in the_line(output, f"warning: {text}")
    line = the_line(output, "opsd: step 3: response_length")
    best = re.search(r"below guards.min_response_length = 46, .* use (the best checkpoint, step (\d)|an earlier)", line)
    assert best, line
    assert best[2] is None or (run_dir / "checkpoints" / f"step_{int(best[2]):06d}").is_dir()
    assert outcome(run_dir) == "stopped"


def write_model_with_a_broken_token(path: Path, text: str) -> Path:
    """The example's model, which never writes ``text``, with a head of its own; where it reads ``text``, it is NaN."""
    shutil.copytree(ARITHMETIC / "base", path)
    weights = load_file(path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()
    embedding[AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return path


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
