"""Runs commands as a user does, ``python -m megatron_opsd`` under torchrun above all, and reads what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


def torchrun(command: str, overrides: dict[str, str], ranks: int) -> list[str]:
    """``opsd COMMAND examples/arithmetic/opsd.toml`` on ``ranks`` processes of this machine."""
    flags = [part for name, value in overrides.items() for part in (f"--{name}", value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "megatron_opsd", command, str(ARITHMETIC / "opsd.toml"), *flags]


def opsd(command: str, overrides: dict[str, str], ranks: int = 1, timeout: float = 300, out: Path | None = None) -> str:
    """Run :func:`torchrun`'s command; returns what it printed."""
    return python(*torchrun(command, overrides, ranks), *(("--out", out) if out else ()), timeout=timeout)


def write_problems(folder: Path, rows: int = 4096) -> dict[str, str]:
    """Write the arithmetic example's data; returns the overrides that name it."""
    python(ARITHMETIC / "problems.py", "--out", folder, "--train", rows)
    return {"data.path": str(folder / "train.jsonl"), "evaluate.data.path": str(folder / "test.jsonl")}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
