"""The folder of a run: its paths, who may write to it, how its files are read, and how the run ended."""

import contextlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_opsd import events
from megatron_opsd.errors import UserError
from megatron_opsd.files import check_name, try_to_write
from megatron_opsd.reliability.run_lock import RunLock

_MEASURED = ("seconds_", "memory_", "tokens_per_second")  # metrics of the machine, not of the training


class RunDir:
    """The only place that knows the names of a run's files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.events = self.path / "events.jsonl"
        self.written = self.path / "written.jsonl"  # responses that a method has let the first weights write
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.skipped = self.path / "skipped"
        self.logs = self.path / "logs"
        self.hf = self.path / "hf"
        self._exported = self.path / "hf.step"
        self.outcome = self.path / "outcome"

    def rollouts(self, step: int) -> Path:
        """The responses of a step."""
        return self.path / "rollouts" / f"step_{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """The responses of the evaluation after ``step`` steps."""
        return self.path / "rollouts" / f"evaluation_{step:06d}.jsonl"

    def contents(self) -> list[str]:
        """What a run has left in the folder that another one would replace or mix with its own."""
        files = [file for file in (self.metrics, self.evaluations, self.written) if _has_a_line(file)]
        folders = [self.checkpoints, self.skipped, self.rollouts(0).parent]
        left = [*files, *(folder for folder in folders if folder.is_dir() and any(folder.iterdir()))]
        return [path.name for path in (*left, self.hf) if path.exists()]

    def check(self) -> None:
        """Check, by writing, that the run can write to its folder.

        Raises:
            UserError: it cannot, or anybody can: somebody else could then have put a checkpoint there.
        """
        field = f"logging.run_dir = {str(self.path)!r}"
        check_name(str(self.path), "logging.run_dir")
        RunLock(self.path).owner()  # which can be read, whoever it is
        for path in self.path.glob("*"):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{field}: {path} is a link to nowhere; remove it")
        for file in (self.config, self.metrics, self.evaluations, self.events, self.written, self.outcome):
            if file.is_dir():
                raise UserError(f"{field}: {file} is a folder, where the run writes a file; move it away")
        for folder in (self.checkpoints, self.skipped, self.rollouts(0).parent, self.logs, self.tensorboard, self.hf):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{field}: {folder} is no folder, where the run makes one; move it away")
        existing = next(parent for parent in (self.path, *self.path.absolute().parents) if os.path.lexists(parent))
        try_to_write(existing, field)
        if self.checkpoints.exists():
            try_to_write(self.checkpoints, field)
        if existing == self.path and self.path.stat().st_mode & stat.S_IWOTH:
            raise UserError(f"{field}: anybody may write to it; chmod o-w {self.path}")

    def prepare(self) -> None:
        """Make the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(self.path.stat().st_mode & ~stat.S_IWOTH)  # the umask may allow it

    def write_config(self, text: str, step: int) -> None:
        """Keep the settings of a start after ``step`` steps: config.toml is that of the first start.

        A start from a checkpoint has a file of its own, if its settings differ.
        """
        if step and self.config.exists():
            if self.config.read_text() != text:
                (self.path / f"config_after_{step:06d}.toml").write_text(text)
        else:
            self.config.write_text(text)

    def exported_step(self) -> int | None:
        """The step whose model is in hf/; None if there is none, or not all of it."""
        text = self._exported.read_text() if self.hf.exists() and self._exported.exists() else ""
        return int(text) if text.isdecimal() else None  # a machine that lost its power may have left an empty file

    def write_exported_step(self, step: int | None) -> None:
        """Note which step's model is in hf/; None before another one is written there."""
        self._exported.unlink(missing_ok=True)
        if step is not None:
            self._exported.write_text(str(step))

    def write_outcome(self, outcome: Literal["finished", "interrupted", "stopped"], why: str) -> None:
        """Leave one line for whoever started the run. A run that crashes leaves none.

        ``finished``: nothing is left to do. ``interrupted``: saved after a signal, start it again. ``stopped``:
        starting it again would not help.
        """
        staging = self.outcome.with_name(f".{self.outcome.name}.{os.getpid()}")
        staging.write_text(f"{outcome}: {' '.join(why.split())}\n")
        staging.rename(self.outcome)
        events.record("end", outcome=outcome, why=why)

    def write_mistake(self, why: str) -> None:
        """Leave why a start has not become a run. Where another run owns the folder, its outcome is its own."""
        with contextlib.suppress(OSError, UserError):  # the mistake may be that the folder cannot be written to
            self.path.mkdir(parents=True, exist_ok=True)
            if not RunLock(self.path).is_anothers():
                self.write_outcome("stopped", why)
            elif job := os.environ.get("SLURM_JOB_ID"):
                (self.path / f"refused_{job}").write_text(f"{why}\n")  # for the batch script of that job

    def read_outcome(self) -> tuple[str, str]:
        """Outcome and reason; both are empty if the run crashed or is still running."""
        text = self.outcome.read_text() if self.outcome.exists() else ""
        outcome, _, why = text.strip().partition(": ")
        return outcome, why

    def repeatable_metrics(self) -> list[dict[str, Any]]:
        """The metrics without times and memory: those that are equal in two runs of one configuration."""
        return [
            {name: value for name, value in line.items() if not name.startswith(_MEASURED)}
            for line in read_jsonl(self.metrics)
        ]


def complete_lines(file: Path) -> list[str]:
    """The lines of a file without the half line that a killed run may have left; none if there is no file yet."""
    if not file.exists():
        return []
    # Not str.splitlines, which also splits at characters that JSON does not escape.
    with file.open(errors="replace") as lines:
        return [line for line in lines if line.endswith("\n")]


def _has_a_line(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open(errors="replace") as lines:
        return next(lines, "").endswith("\n")


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file as objects."""
    return [json.loads(line) for line in complete_lines(file)]


def write_jsonl(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
