"""kill -9 at random moments of a step: the run that is started again equals one that was left alone.

``make test`` does it three times with the tests' own engine, ``make test-all`` three times more with the real vLLM,
under torchrun. ``make test-kills`` does that 20 times and writes benchmarks/results/kills.md.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from .command_line import write_problems
from .harness import ROOT
from .runs import Run, Way, assert_equal_runs, began_after, complete, start
from .test_failures import QUICK

PHASES = ("save", "rollout", "teacher", "student", "refit")
KILLS = int(os.environ.get("KILLS", "3"))
CHAIN = 5  # kills of one run
STEPS = 12  # a start that is killed brings its run at most two steps on


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.thorough)])
def unbroken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str], Way]:
    folder = tmp_path_factory.mktemp("kills")
    settings = QUICK | write_problems(folder / "data") | {"train.steps": str(STEPS)}
    complete(folder / "unbroken", settings, request.param)
    return folder / "unbroken", settings, request.param


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
def test_a_run_goes_on_after_every_kill(
    seeds: range, unbroken: tuple[Path, dict[str, str], Way], report: list[str]
) -> None:
    wanted, settings, way = unbroken
    run_dir = wanted.with_name(f"killed_{seeds[0]}")
    kills: list[tuple[str, int]] = []
    for seed in seeds:
        draw = random.Random(seed)
        phase, rank, delay = PHASES[seed % len(PHASES)], draw.randrange(2), draw.uniform(0, 0.4)
        with start(run_dir, settings, way) as run:
            # In one of the first steps of this start, most of them after its first checkpoint. The third and the sixth
            # time that it enters `save`, it writes.
            occurrence = draw.choice((3, 6)) if phase == "save" else draw.randint(2, 4)
            run.wait_until(lambda: run.phases().count(phase) == occurrence)  # noqa: B023
            time.sleep(delay)
            run.signal(signal.SIGKILL, rank)
            killed, done = time.monotonic(), run.steps()
            statuses, output = run.finish()
        assert any(statuses), output
        gone = time.monotonic() - killed
        assert gone < 30
        check_going_on(run, kills, report)
        kills.append((f"| {seed} | {phase} | {rank} | {delay:.2f} | {gone:.1f} |", done))
    check_going_on(complete(run_dir, settings, way), kills, report)
    assert_equal_runs(run_dir, wanted)


def check_going_on(run: Run, kills: list[tuple[str, int]], report: list[str]) -> None:
    """Where ``run`` took up the run directory again after the last of ``kills``."""
    if kills:
        row, done = kills[-1]
        step = began_after(run)
        assert done - step <= int(QUICK["checkpoint.save_interval"])
        report.append(f"{row} {step} | {max(0, done - step)} | yes |")
