"""The folder of a run: who may write to it, and the line that says how the run ended."""

import os
import stat
from pathlib import Path
from typing import Literal

from megatron_opsd.errors import UserError

OUTCOME = "outcome"


def prepare(run_dir: Path) -> None:
    """Make the folder, and forget how an earlier start of the run ended.

    Raises:
        UserError: anybody may write to it: what is loaded from it later could be somebody else's.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    mode = run_dir.stat().st_mode
    if mode & stat.S_IWOTH:
        raise UserError(f"logging.run_dir = '{run_dir}': anybody may write to it; chmod o-w '{run_dir}'")
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
