"""Training runs in the background, to be signalled, stopped and killed; and what their run directories must hold."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors.torch import load_file

from .command_line import ROOT, SETTINGS, read_jsonl, torchrun

STEPS = 5
QUICK = {
    "train.steps": str(STEPS),
    "train.global_batch_size": "16",
    "train.micro_batch_size": "8",
    "evaluate.interval": "0",
    "logging.tensorboard": "false",
    "checkpoint.save_interval": "2",
    "checkpoint.keep_last": "0",
    "checkpoint.resume": "auto",
}
UNREPEATABLE = ("seconds_", "memory_", "tokens_per_second")


class Run:
    """``opsd train`` on the arithmetic example, two ranks."""

    def __init__(self, run_dir: Path, overrides: dict[str, str], limit_file_kib: int | None = None) -> None:
        self.run_dir = run_dir
        command = [sys.executable, *torchrun("train", overrides | {"logging.run_dir": str(run_dir)}, ranks=2)]
        if limit_file_kib:  # the kernel refuses to write more to a file, as a full disk does
            command = ["bash", "-c", f'ulimit -f {limit_file_kib}; exec "$@"', "bash", *command]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | SETTINGS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def workers(self) -> list[int]:
        """Process ids of the ranks, in order."""
        children = psutil.Process(self._process.pid).children()
        found = {int(c.environ()["RANK"]): c.pid for c in children if "megatron_opsd" in c.cmdline()}
        return [found[rank] for rank in sorted(found)]

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to all."""
        for pid in self.workers() if rank is None else [self.workers()[rank]]:
            os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._process.poll() is None, self.finish()[1]
            assert time.monotonic() < deadline, f"{self.run_dir} is not where it should be after {timeout} s"
            time.sleep(0.02)

    def phases(self, rank: int = 0) -> list[str]:
        """The phases that a rank has entered so far."""
        log = self.run_dir / "logs" / f"train_rank_{rank:04d}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.rsplit(": ", 1)[1] for line in lines if " megatron_opsd.watchdog: phase: " in line]

    def steps(self) -> int:
        file = self.run_dir / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def finish(self, timeout: float = 180) -> tuple[int, str]:
        """Exit status and all output."""
        output, _ = self._process.communicate(timeout=timeout)
        return self._process.returncode, output

    def end(self) -> None:
        """Kill whatever is left of it."""
        if self._process.poll() is None:
            for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
                process.kill()
            self._process.wait()


@contextmanager
def started(run_dir: Path, overrides: dict[str, str], limit_file_kib: int | None = None) -> Iterator[Run]:
    run = Run(run_dir, overrides, limit_file_kib)
    try:
        yield run
    finally:
        run.end()


def complete(run_dir: Path, overrides: dict[str, str]) -> str:
    """Run it to its end; returns what it printed."""
    with started(run_dir, overrides) as run:
        status, output = run.finish()
    assert status == 0, output
    assert outcome(run_dir) == "finished"
    return output


def outcome(run_dir: Path) -> str:
    """The first word of how the run ended; nothing where it crashed."""
    file = run_dir / "outcome"
    return file.read_text().split(":")[0] if file.exists() else ""


def numbers(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what two runs need not share."""
    return [
        {name: value for name, value in line.items() if not name.startswith(UNREPEATABLE)}
        for line in read_jsonl(run_dir / "metrics.jsonl")
    ]


def assert_equal_runs(run_dir: Path, wanted: Path, steps: int = STEPS) -> None:
    """The same metrics, each step once, and the same final weights bit for bit."""
    assert [line["step"] for line in numbers(run_dir)] == list(range(1, steps + 1))
    assert numbers(run_dir) == numbers(wanted)
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run_dir, wanted))
    assert weights.keys() == others.keys()
    assert all((weights[name] == others[name]).all() for name in others)
