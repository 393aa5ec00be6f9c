"""Starts training runs of the arithmetic example, watches, signals and kills them, and reads their run directories."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from safetensors.torch import load_file

from megatron_opsd import cli, trainer
from megatron_opsd.reliability.run_dir import RunDir, read_jsonl

from .command_line import Torchrun, arguments
from .engine import TransformersEngine
from .harness import Ranks, run_distributed

# "transformers": forked ranks with the tests' own engine. "vllm": the real one, under torchrun.
Way = Literal["transformers", "vllm"]


def opsd(command_line: list[str], own_engine: bool = False) -> None:
    """Run the command line on one rank."""
    if own_engine:
        trainer.build_engine = TransformersEngine  # type: ignore[assignment]
    cli.main(command_line)


def train(run_dir: Path, ranks: int, overrides: dict[str, str], timeout: float = 300) -> str:
    """Do a whole run on forked ranks with the real vLLM; returns its output."""
    return run_distributed(
        opsd, ranks, arguments("train", overrides | {"logging.run_dir": str(run_dir)}), timeout=timeout
    )


class Run:
    """A run in the background, and the contents of its run directory."""

    def __init__(self, run_dir: Path, launch: Callable[[], Ranks | Torchrun]) -> None:
        self.run_dir = run_dir
        self._earlier = len(self.events())
        self._ranks = launch()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        pids = self._ranks.pids()
        for pid in pids if rank is None else [pids[rank]]:
            os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert not self._ranks.ended(), self.finish()
            assert time.monotonic() < deadline, f"{self.run_dir}: not there after {timeout} s\n{self._ranks.output()}"
            time.sleep(0.02)

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """All events of the run directory, including those of earlier starts, or only those of one name."""
        events = read_jsonl(self.run_dir / "events.jsonl")
        return [event for event in events if not name or event["event"] == name]

    def phases(self) -> list[str]:
        """The phases that this start has entered so far."""
        new = self.events()[self._earlier :]
        return [event["phase"] for event in new if event["event"] == "phase"]

    def steps(self) -> int:
        """How many steps have been recorded."""
        return len(read_jsonl(self.run_dir / "metrics.jsonl"))

    def finish(self, timeout: float = 180) -> tuple[list[int], str]:
        """Exit statuses of the ranks (under torchrun: its own), and all output."""
        return self._ranks.finish(timeout), self._ranks.output()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ranks.__exit__()


def start(run_dir: Path, overrides: dict[str, str], way: Way, limit_file_bytes: int | None = None) -> Run:
    """Start ``opsd train`` on two ranks."""
    command = arguments("train", overrides | {"logging.run_dir": str(run_dir)})

    def launch() -> Ranks | Torchrun:
        if way == "vllm":
            return Torchrun(2, "-m", "megatron_opsd", *command, limit_file_bytes=limit_file_bytes)
        return Ranks(opsd, 2, command, True, limit_file_bytes=limit_file_bytes)

    return Run(run_dir, launch)


def complete(run_dir: Path, overrides: dict[str, str], way: Way) -> Run:
    """Run ``opsd train`` to its end. Only the directory of the returned run is left."""
    with start(run_dir, overrides, way) as run:
        statuses, output = run.finish()
        assert not any(statuses), output
    assert outcome(run_dir) == "finished"
    return run


def began_after(run: Run) -> int:
    """The step from which the last start resumed."""
    return run.events("start")[-1]["step"]


def outcome(run_dir: Path) -> str:
    """The first word of how the run ended; empty if it crashed."""
    return RunDir(run_dir).read_outcome()[0]


def tokens(run_dir: Path, step: int) -> list[list[int]]:
    """The responses of one step."""
    return [record["token_ids"] for record in read_jsonl(run_dir / "rollouts" / f"step_{step:06d}.jsonl")]


def assert_same_weights(run_dir: Path, wanted: Path) -> None:
    """Compare two exported models bit for bit."""
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run_dir, wanted))
    assert weights.keys() == others.keys()
    assert all((weights[name] == others[name]).all() for name in others)


def assert_equal_runs(run_dir: Path, wanted: Path) -> None:
    """Check for the same metrics, each step once, and the same final weights bit for bit."""
    metrics = RunDir(run_dir).repeatable_metrics()
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    assert metrics == RunDir(wanted).repeatable_metrics()
    assert_same_weights(run_dir, wanted)
