"""kill -9 at random moments of a step: the run that is started again equals one that was left alone.

``make test-kills`` does it 20 times and writes benchmarks/results/kills.md; by default it is done three times.
"""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from .command_line import ROOT, write_problems
from .failing import QUICK, STEPS, assert_equal_runs, complete, started

PHASES = ("save", "rollout", "teacher", "student", "refit")
KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("kills")
    settings = QUICK | write_problems(folder / "data")
    complete(folder / "unbroken", settings)
    return folder / "unbroken", settings


@pytest.fixture(scope="module")
def report() -> list[str]:
    """A row for each kill; written down where all have been done."""
    rows: list[str] = []
    yield rows  # type: ignore[misc]
    if KILLS >= 20 and len(rows) == KILLS:
        head = (
            "# kill -9 of a random rank at seeded random moments\n\n"
            f"`make test-kills`: the arithmetic example on two ranks, {STEPS} steps, a checkpoint every 2. Each was "
            "started again once; its metrics and final weights equal an undisturbed run's bit for bit. `gone`: seconds "
            "until all processes had ended. `done again`: steps.\n\n"
            "| seed | phase | rank | after, s | gone, s | went on after step | done again | equal |\n"
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |\n"
        )
        (ROOT / "benchmarks" / "results" / "kills.md").write_text(head + "\n".join(rows) + "\n")


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_goes_on(seed: int, unbroken: tuple[Path, dict[str, str]], report: list[str]) -> None:
    wanted, settings = unbroken
    draw = random.Random(seed)
    phase, rank = PHASES[seed % len(PHASES)], draw.randrange(2)
    # Of the phase: in which step. A save is entered in every step, and begun in the third and the sixth time.
    occurrence = draw.choice((3, 6)) if phase == "save" else draw.randint(2, STEPS)
    delay = draw.uniform(0, 0.4)
    run_dir = wanted.with_name(f"killed_{seed}")
    with started(run_dir, settings) as run:
        run.wait_until(lambda: run.phases(rank).count(phase) == occurrence)
        time.sleep(delay)
        run.signal(signal.SIGKILL, rank)
        killed, done = time.monotonic(), run.steps()
        status, output = run.finish()
        gone = time.monotonic() - killed
    assert status != 0, output
    assert gone < 30
    output = complete(run_dir, settings)
    found = re.search(r"going on after step (\d+)", output)
    start = int(found[1]) if found else 0
    assert done - start <= int(settings["checkpoint.save_interval"]) + 1  # the save under way is lost with its run
    assert_equal_runs(run_dir, wanted)
    report.append(f"| {seed} | {phase} | {rank} | {delay:.2f} | {gone:.1f} | {start} | {max(0, done - start)} | yes |")
