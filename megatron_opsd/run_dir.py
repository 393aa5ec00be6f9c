"""The folder of a run: who may write to it, and the line that says how the run ended."""

import os
import stat
from pathlib import Path
from typing import Literal

from megatron_opsd.errors import UserError

OUTCOME = "outcome"


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
