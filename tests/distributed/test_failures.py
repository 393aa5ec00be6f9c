"""Runs that are signalled, stopped, starved or fed bad data: each costs one clear line, and nothing is lost."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from .command_line import ARITHMETIC, read_jsonl, write_problems
from .failing import QUICK, STEPS, assert_equal_runs, complete, numbers, outcome, started


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run of five steps, saved after two, four and five; and the settings of runs like it."""
    folder = tmp_path_factory.mktemp("failures")
    settings = QUICK | write_problems(folder / "data")
    complete(folder / "unbroken", settings)
    return folder / "unbroken", settings


def the_line(output: str, words: str) -> str:
    """The one line of the output that has ``words``."""
    lines = [line for line in output.splitlines() if words in line]
    assert len(lines) == 1, output
    return lines[0]


def copy_of(unbroken: Path, name: str) -> Path:
    """The run as it was after four steps, one step after its last checkpoint but one... and without its result."""
    run_dir = unbroken.with_name(name)
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "hf")
    shutil.rmtree(run_dir / "checkpoints" / "step_000005")
    return run_dir


def flip_a_byte(checkpoint: Path) -> Path:
    file = max(checkpoint.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    return file


def test_a_flipped_byte_is_named_and_the_checkpoint_before_taken(unbroken: tuple[Path, dict[str, str]]) -> None:
    wanted, settings = unbroken
    run_dir = copy_of(wanted, "flipped")
    file = flip_a_byte(run_dir / "checkpoints" / "step_000004")
    output = complete(run_dir, settings)
    assert "going on from the checkpoint before" in the_line(output, f"{file} is damaged (checksum ")
    assert "going on after step 2" in output
    assert_equal_runs(run_dir, wanted)

    for name in ("step_000002", "step_000004", "step_000005"):  # all of them: nothing to go on from
        flip_a_byte(run_dir / "checkpoints" / name)
    with started(run_dir, settings) as run:
        assert run.finish()[0] != 0
    with started(run_dir, settings | {"checkpoint.resume": str(run_dir / "checkpoints" / "step_000002")}) as run:
        status, output = run.finish()
    assert status != 0
    assert "resume from another checkpoint" in the_line(output, "step_000002/")
    assert outcome(run_dir) == "stopped"


def test_a_changed_teacher_stops_the_run(unbroken: tuple[Path, dict[str, str]]) -> None:
    wanted, settings = unbroken
    model = wanted.with_name("model")
    shutil.copytree(ARITHMETIC / "base", model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    run_dir = copy_of(wanted, "teacher")
    with started(run_dir, settings | {"model.path": str(model)}) as run:
        status, output = run.finish()
    assert status != 0
    hashes = re.findall(r"\b[0-9a-f]{16}\b", the_line(output, "was trained with the teacher"))
    assert len(set(hashes)) == 2
    assert outcome(run_dir) == "stopped"


def test_a_signal_saves_and_a_second_one_leaves_at_once(unbroken: tuple[Path, dict[str, str]]) -> None:
    """To one rank only: the others must learn of it. The step under way is finished, for there is time."""
    wanted, settings = unbroken
    run_dir = wanted.with_name("signalled")
    with started(run_dir, settings) as run:
        run.wait_until(lambda: run.steps() == 3)
        run.signal(signal.SIGUSR1, rank=1)
        status, output = run.finish()
    assert status == 0, output
    assert outcome(run_dir) == "interrupted"
    done = run.steps()
    assert (run_dir / "checkpoints" / f"step_{done:06d}").is_dir()

    with started(run_dir, settings) as run:
        run.wait_until(lambda: run.phases().count("start") == 2)  # while the models are loaded
        run.signal(signal.SIGUSR1)
        time.sleep(5.5)
        run.signal(signal.SIGUSR1, rank=0)
        second = time.monotonic()
        status, output = run.finish()
    assert status != 0
    assert time.monotonic() - second < 20
    assert "exitcode  : 138" in output  # 128 + USR1
    assert outcome(run_dir) == ""

    assert f"going on after step {done}" in complete(run_dir, settings)
    assert_equal_runs(run_dir, wanted)


@pytest.mark.parametrize("phase", ["rollout", "student"])
def test_a_step_without_time_to_end_is_given_up(phase: str, unbroken: tuple[Path, dict[str, str]]) -> None:
    wanted, settings = unbroken
    run_dir = wanted.with_name(f"given_up_{phase}")
    with started(run_dir, settings | {"checkpoint.signal_lead_seconds": "0.1"}) as run:
        run.wait_until(lambda: run.phases().count(phase) == 4)
        run.signal(signal.SIGTERM if phase == "student" else signal.SIGUSR1)
        status, output = run.finish()
    assert status == 0, output
    assert outcome(run_dir) == "interrupted"
    assert "for which checkpoint.signal_lead_seconds = 0.1 leaves no room; let signals come" in output
    assert run.steps() == (3 if phase == "rollout" else 4)  # what comes after the teacher's pass is not given up
    complete(run_dir, settings)
    assert_equal_runs(run_dir, wanted)


def test_a_hung_rank_is_named(unbroken: tuple[Path, dict[str, str]]) -> None:
    wanted, settings = unbroken
    run_dir = wanted.with_name("hung")
    limits = {f"timeouts.{name}": "0.1" for name in ("rollout", "teacher", "student", "optimizer", "refit", "save")}
    with started(run_dir, settings | limits | {"train.steps": "100"}) as run:
        run.wait_until(lambda: run.steps() == 2)
        run.signal(signal.SIGSTOP, rank=1)
        stopped = time.monotonic()
        status, output = run.finish()
    assert status != 0
    assert time.monotonic() - stopped < 60
    line = the_line(output, "opsd: the phase")
    hung = r"has taken \d+ s \(timeouts\.\w+ = 0.1 minutes\); rank 1 no sign of life, last in \w+ at \S+:\d+"
    assert re.search(hung, line)
    assert re.search(r"; rank 0 in \w+ at \S+\.py:\d+ \w+$", line)
    assert outcome(run_dir) == ""
    complete(run_dir, settings)
    assert_equal_runs(run_dir, wanted)


def test_a_full_disk_costs_checkpoints_but_not_the_run(unbroken: tuple[Path, dict[str, str]]) -> None:
    wanted, settings = unbroken
    run_dir = wanted.with_name("full")
    with started(run_dir, settings, limit_file_kib=2000) as run:
        status, output = run.finish()
    assert status != 0
    for step in (2, 4):
        line = the_line(output, f"the checkpoint of step {step} could not be written")
        assert re.search(r"(File too large|unexpected pos).* GiB free\); going on without it", line)
    line = the_line(output, f"opsd: {run_dir / 'checkpoints'}: the checkpoint of step {STEPS} could not be written")
    assert re.search(r"(File too large|unexpected pos).* GiB free\)", line)
    assert outcome(run_dir) == "stopped"
    assert numbers(run_dir) == numbers(wanted)
    assert list((run_dir / "checkpoints").iterdir()) == []  # what could not be completed is gone
    complete(run_dir, settings)
    assert_equal_runs(run_dir, wanted)


def test_a_loss_that_is_not_finite_changes_nothing(unbroken: tuple[Path, dict[str, str]]) -> None:
    """A token of one solution has broken weights, so that the teacher's answer to that problem is NaN."""
    wanted, settings = unbroken
    folder = wanted.parent
    model = write_model_with_a_broken_token(folder / "broken_model", "§")
    rows = read_jsonl(Path(settings["data.path"]))[:64]
    clean, broken = folder / "clean.jsonl", folder / "broken.jsonl"
    _write(clean, rows)
    _write(broken, [row | {"solution": row["solution"] + " §"} if i < 16 else row for i, row in enumerate(rows)])
    settings = settings | {"model.path": str(model), "evaluate.data.path": str(clean), "data.path": str(broken)}
    run_dir = folder / "not_finite"
    limits = {"train.global_batch_size": "4", "train.micro_batch_size": "2", "guards.max_skipped_steps": "100"}
    saves = {"checkpoint.save_interval": "1", "checkpoint.keep_last": "1", "checkpoint.keep_every": "4"}
    output = complete(run_dir, settings | limits | saves | {"train.steps": "6"})
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    lines = numbers(run_dir)
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert 0 < len(skipped) < 6, output
    for line in lines:
        assert (line["loss"] is None) == (line["step"] in skipped)
        file = run_dir / "skipped" / f"step_{line['step']:06d}.jsonl"
        assert file.exists() == (line["step"] in skipped)
    for file in (run_dir / "skipped").iterdir():
        assert any(record["index"] < 16 for record in read_jsonl(file))
    exported = load_file(run_dir / "hf" / "model.safetensors")
    assert all(value.isfinite().all() for name, value in exported.items() if name != "model.embed_tokens.weight")

    _write(broken, [row | {"solution": row["solution"] + " §"} for row in rows])
    run_dir = folder / "never_finite"
    with started(run_dir, settings | limits | {"guards.max_skipped_steps": "1"}) as run:
        status, output = run.finish()
    assert status != 0
    assert "not finite for 2 steps in a row (guards.max_skipped_steps = 1)" in the_line(output, "opsd: step 2:")
    assert outcome(run_dir) == "stopped"


def test_a_collapse_warns_and_then_ends_the_run(unbroken: tuple[Path, dict[str, str]]) -> None:
    wanted, settings = unbroken
    run_dir = wanted.with_name("collapsed")
    bounds = {"guards.min_response_length": "40", "guards.patience": "3", "evaluate.interval": "1"}
    with started(run_dir, settings | bounds | {"evaluate.limit": "4", "checkpoint.save_interval": "1"}) as run:
        status, output = run.finish()
    assert status != 0
    for step in (1, 2):
        assert f"({step} of 3 steps in a row)" in the_line(output, f"warning: step {step}: response_length")
    line = the_line(output, "opsd: step 3: response_length")
    best = re.search(r"below guards.min_response_length = 40, .* use (the best checkpoint, step (\d)|an earlier)", line)
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
