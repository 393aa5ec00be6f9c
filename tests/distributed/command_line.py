"""Runs ``python -m megatron_opsd`` as a user does, under torchrun, and reads what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARITHMETIC = ROOT / "examples" / "arithmetic"


def opsd(command: str, *arguments: str, ranks: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """``opsd COMMAND examples/arithmetic/opsd.toml ARGUMENTS`` on ``ranks`` processes of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_opsd", command, str(ARITHMETIC / "opsd.toml"), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(run_dir: Path, *arguments: str, ranks: int, timeout: float = 300) -> str:
    """Train on the arithmetic example's own problems; returns what the run printed."""
    data = run_dir.parent / "data"
    if not data.exists():
        script = str(ARITHMETIC / "problems.py")
        subprocess.run(
            [sys.executable, script, "--out", str(data)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    files = ("--data.path", str(data / "train.jsonl"), "--evaluate.data.path", str(data / "test.jsonl"))
    done = opsd("train", "--logging.run_dir", str(run_dir), *files, *arguments, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
