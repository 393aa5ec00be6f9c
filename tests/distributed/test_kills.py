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
from .failing import QUICK, assert_equal_runs, complete, started

PHASES = ("save", "rollout", "teacher", "student", "refit")
KILLS = int(os.environ.get("KILLS", "3"))
CHAIN = 5  # kills of one run
STEPS = 12  # a start that is killed brings its run at most two steps on


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("kills")
    settings = QUICK | write_problems(folder / "data") | {"train.steps": str(STEPS)}
    complete(folder / "unbroken", settings)
    return folder / "unbroken", settings


@pytest.fixture(scope="module")
def report() -> list[str]:
    """A row for each kill; written down when all have been done."""
    rows: list[str] = []
    yield rows  # type: ignore[misc]
    if KILLS >= 20 and len(rows) == KILLS:
        head = (
            "# kill -9 of a random rank at seeded random moments\n\n"
            f"`make test-kills`: the arithmetic example on two ranks, {STEPS} steps, a checkpoint every 2. Each run "
            f"was killed {CHAIN} times and started again each time; then its metrics and final weights equal an "
            "undisturbed run's bit for bit. `gone`: seconds until all processes had ended. `done again`: steps.\n\n"
            "| seed | phase | rank | after, s | gone, s | went on after step | done again | equal |\n"
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |\n"
        )
        (ROOT / "benchmarks" / "results" / "kills.md").write_text(head + "\n".join(rows) + "\n")


@pytest.mark.parametrize("seeds", [range(n, min(n + CHAIN, KILLS)) for n in range(0, KILLS, CHAIN)], ids=str)
def test_a_run_goes_on_after_every_kill(seeds: range, unbroken: tuple[Path, dict[str, str]], report: list[str]) -> None:
    wanted, settings = unbroken
    run_dir = wanted.with_name(f"killed_{seeds[0]}")
    kills: list[tuple[str, int]] = []
    for seed in seeds:
        draw = random.Random(seed)
        phase, rank, delay = PHASES[seed % len(PHASES)], draw.randrange(2), draw.uniform(0, 0.4)
        with started(run_dir, settings) as run:
            earlier = len(run.phases(rank))
            # In one of the first steps of this start, most of them after its first checkpoint. The third and the sixth
            # time that it enters `save`, it writes.
            occurrence = draw.choice((3, 6)) if phase == "save" else draw.randint(2, 4)
            run.wait_until(lambda: run.phases(rank)[earlier:].count(phase) == occurrence)  # noqa: B023
            time.sleep(delay)
            run.signal(signal.SIGKILL, rank)
            killed, done = time.monotonic(), run.steps()
            status, output = run.finish()
        assert status != 0, output
        gone = time.monotonic() - killed
        assert gone < 30
        kills.append((f"| {seed} | {phase} | {rank} | {delay:.2f} | {gone:.1f} |", done))
        check_going_on(output, kills[:-1], report)
    check_going_on(complete(run_dir, settings), kills, report)
    assert_equal_runs(run_dir, wanted, STEPS)


def check_going_on(output: str, kills: list[tuple[str, int]], report: list[str]) -> None:
    """Where the start that wrote ``output`` took up the run again after the last of ``kills``."""
    if kills:
        row, done = kills[-1]
        found = re.search(r"going on after step (\d+)", output)
        start = int(found[1]) if found else 0
        assert done - start <= int(QUICK["checkpoint.save_interval"])
        report.append(f"{row} {start} | {max(0, done - start)} | yes |")
