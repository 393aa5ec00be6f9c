"""Runs commands as a user does, in processes of their own."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

import psutil

from megatron_opsd import cli

from .harness import ROOT

ARITHMETIC = ROOT / "examples" / "arithmetic"
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "COLUMNS": "160"}


def run(command: list[str], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the root of the repository, one thread a process."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | SETTINGS | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def python(*arguments: object, timeout: float = 300) -> str:
    """Run Python; returns what it printed."""
    done = run([sys.executable, *map(str, arguments)], timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_problems(folder: Path, rows: int = 4096) -> dict[str, str]:
    """Write the arithmetic example's data; returns the overrides that name it."""
    python(ARITHMETIC / "problems.py", "--out", folder, "--train", rows)
    return {"data.path": str(folder / "train.jsonl"), "evaluate.data.path": str(folder / "test.jsonl")}


def arguments(command: str, overrides: dict[str, str]) -> list[str]:
    """Of ``opsd COMMAND examples/arithmetic/opsd.toml``."""
    return [command, str(ARITHMETIC / "opsd.toml"), *cli.flags(overrides)]


class Torchrun:
    """``torchrun COMMAND`` on this machine: what :class:`harness.Ranks` is, but as a user starts it."""

    def __init__(self, ranks: int, *command: str, limit_file_bytes: int | None = None) -> None:
        launcher = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
        full = [sys.executable, "-m", "torch.distributed.run", *launcher, *command]
        if limit_file_bytes:
            full = ["bash", "-c", f'ulimit -f {limit_file_bytes // 1024}; exec "$@"', "bash", *full]
        self._pids: dict[int, int] = {}
        self._output = tempfile.NamedTemporaryFile(mode="r", errors="replace")  # noqa: SIM115 - until `end`
        with Path(self._output.name).open("w") as output:
            self._process = subprocess.Popen(
                full, cwd=ROOT, env=os.environ | SETTINGS, stdout=output, stderr=output, start_new_session=True
            )

    def pids(self) -> list[int]:
        """Process ids in the order of the ranks, also of those that have ended since they were first seen."""
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                rank = child.environ().get("RANK")
                if rank is not None:
                    self._pids[int(rank)] = child.pid
        return [self._pids[rank] for rank in sorted(self._pids)]

    def ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self, timeout: float) -> list[int]:
        """Torchrun's exit status."""
        try:
            return [self._process.wait(timeout)]
        except subprocess.TimeoutExpired as late:
            raise TimeoutError(f"{late}\n{self.output()}") from None

    def output(self) -> str:
        return Path(self._output.name).read_text(errors="replace")

    def end(self) -> None:
        if self._process.poll() is None:
            for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
                process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._output.close()
