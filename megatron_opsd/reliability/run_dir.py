"""The folder of a run: who may write to it, how its files are read, and the line that says how the run ended."""

import json
import os
import stat
from pathlib import Path
from typing import Any, Literal

from megatron_opsd import events
from megatron_opsd.errors import UserError

OUTCOME = "outcome"
_MEASURED = ("seconds_", "memory_", "tokens_per_second")  # metrics of the machine, not of the training


def check(run_dir: Path) -> None:
    """Look whether the run can write to its folder, before hours are spent.

    Raises:
        UserError: it cannot, or anybody can: a checkpoint to go on from could then be somebody else's.
    """
    existing = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"logging.run_dir = {str(run_dir)!r}: cannot write to {existing}")
    if existing == run_dir and run_dir.stat().st_mode & stat.S_IWOTH:
        raise UserError(f"logging.run_dir = {str(run_dir)!r}: anybody may write to it; chmod o-w {run_dir}")


def prepare(run_dir: Path) -> None:
    """Make the folder, and forget how an earlier start of the run ended."""
    run_dir.mkdir(parents=True, exist_ok=True)
    run_dir.chmod(run_dir.stat().st_mode & ~stat.S_IWOTH)  # whatever the umask
    (run_dir / OUTCOME).unlink(missing_ok=True)


def write_outcome(run_dir: Path, outcome: Literal["finished", "interrupted", "stopped"], why: str) -> None:
    """Leave one line for whoever started the run. A run that crashes leaves none.

    ``finished``: nothing is left to do. ``interrupted``: saved after a signal, start it again. ``stopped``: starting it
    again would not help.
    """
    file = run_dir / OUTCOME
    staging = file.with_name(f".{OUTCOME}.{os.getpid()}")
    staging.write_text(f"{outcome}: {' '.join(why.split())}\n")
    staging.rename(file)
    events.record("end", outcome=outcome, why=why)


def read_outcome(run_dir: Path) -> tuple[str, str]:
    """What :func:`write_outcome` left: outcome and reason; both are empty where the run crashed or is still running."""
    file = run_dir / OUTCOME
    outcome, _, why = file.read_text().strip().partition(": ") if file.exists() else ("", "", "")
    return outcome, why


def complete_lines(file: Path) -> list[str]:
    """The lines of a file without the half line that a killed run may have left; none where there is no file yet."""
    if not file.exists():
        return []
    with file.open() as lines:  # str.splitlines would also split at characters that JSON leaves in a text
        return [line for line in lines if line.endswith("\n")]


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file as objects."""
    return [json.loads(line) for line in complete_lines(file)]


def repeatable_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory: what two runs of one configuration have in common."""
    return [
        {name: value for name, value in line.items() if not name.startswith(_MEASURED)}
        for line in read_jsonl(run_dir / "metrics.jsonl")
    ]
