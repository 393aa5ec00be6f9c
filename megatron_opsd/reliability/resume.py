"""Which checkpoint a start goes on from, and whether it may: it must still mean the same training. Without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_opsd.config import Config, Positive
from megatron_opsd.errors import UserError
from megatron_opsd.files import excerpt, read_json
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.types import Progress

PROGRESS = "progress.json"

# What a run learns, apart from its data and its model, which are compared by their contents.
_MEANING = {"method", "teacher", "prompts", "objective"}
_OF_A_DIVERGENCE = ("kind", "beta", "clip_mode", "clip")


class _Progress(BaseModel):
    """A :class:`Progress` in its file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    teacher: str
    sampler: dict[str, Any]
    step: Positive
    evaluated_step: int = -1
    guards: dict[str, Any] = {}
    entropy_threshold: float | None = None
    meaning: dict[str, Any]


def meaning(config: Config) -> dict[str, Any]:
    """The settings that a run must keep to stay the same training, by their dotted names."""
    sections = config.model_dump(mode="json", include=_MEANING)
    sections["train"] = config.train.model_dump(mode="json", include={"seed", "curriculum"})
    sections["data"] = config.data.model_dump(mode="json", include={"difficulty_column"})
    sections["evaluate"] = config.evaluate.model_dump(mode="json", include={"answer_check"})
    settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {name: value for name, value in settings.items() if name not in _unread(config)}


def _unread(config: Config) -> set[str]:
    """Settings that change nothing of what this run learns."""
    method, names = config.method, {"teacher.placement", "objective.chunk_size"}
    sees = method.teacher_sees
    for is_read, some in (
        (method.has_teacher, {"teacher.kind"}),
        (config.teacher_kind == "ema", {"teacher.ema_decay"}),
        (sees != "nothing", {"prompts.teacher_thinking", "prompts.teacher_prefix"}),
        (sees == "answer", {"prompts.answer_template"}),
        (sees == "solution" or method.writes_in_sight, {"prompts.teacher_template"}),
        (method.has_teacher and not method.samples_tokens, {f"objective.{name}" for name in _OF_A_DIVERGENCE}),
        (method.samples_tokens, {"objective.importance_cap", "objective.allow_biased_sampling"}),
        (config.reads_grades, {"evaluate.answer_check"}),
    ):
        names |= set() if is_read else some
    return names


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings with another meaning now, such as ``objective.beta: 0.5 -> 0.3``."""
    names = [name for name in before if before[name] != now.get(name)]
    return [f"{name}: {excerpt(before[name])} -> {excerpt(now.get(name))}" for name in names]


def choose(run_dir: RunDir, resume: str) -> Path | None:
    """The complete checkpoint that ``checkpoint.resume`` selects: none, the newest, or the one in a directory.

    Raises:
        UserError: the directory is not a complete checkpoint, or the run's folder has what the start would replace.
    """
    newest, folder = max(complete_ones(run_dir.checkpoints), default=None), run_dir.path
    if resume == "never":
        if found := run_dir.contents():
            raise UserError(
                f"logging.run_dir = {str(folder)!r}: holds an earlier run ({', '.join(found)}); go on from its "
                "checkpoints with --checkpoint.resume auto, or choose another --logging.run_dir"
            )
        return None
    step = read_progress(Path(resume)).step if resume != "auto" else 0
    if newest and step and read_progress(newest).step > step:
        raise UserError(
            f"{folder}: holds checkpoints newer than {resume}, which a later --checkpoint.resume auto would take; "
            "choose another --logging.run_dir, or move them away"
        )
    if run_dir.hf.exists() and not newest:
        raise UserError(
            f"{run_dir.hf}: is an earlier run's model, of which there are no checkpoints to go on from; choose another "
            "--logging.run_dir"
        )
    return newest if resume == "auto" else Path(resume)


def check(config: Config) -> None:
    """Check whether a start may go on from the checkpoint that it will select if none is damaged.

    Raises:
        UserError: as :func:`choose` and :func:`check_meaning`.
    """
    check_meaning(choose(RunDir(config.logging.run_dir), config.checkpoint.resume), config)


def check_meaning(path: Path | None, config: Config) -> list[str]:
    """Check whether a run may go on from a checkpoint. Returns the changes that the user allows.

    Raises:
        UserError: settings have changed that the run must keep.
    """
    if path is None:
        return []
    before = read_progress(path).meaning
    changed = changes(before, meaning(config))
    if changed and not config.checkpoint.allow_changes:
        raise UserError(
            f"{path}: was trained with other settings than this start has ({'; '.join(changed)}); give the first ones, "
            "choose another --logging.run_dir, or go on with --checkpoint.allow_changes true"
        )
    if config.teacher_kind == "ema" and before.get("teacher.kind") != "ema":
        raise UserError(f"teacher.kind = 'ema': {path} holds no teacher's average to go on from; start a new run")
    return changed


def is_done(config: Config) -> int | None:
    """How many steps are done, if no more are to be done and the trained model is there where it is wanted."""
    run_dir = RunDir(config.logging.run_dir)
    path = choose(run_dir, config.checkpoint.resume)
    if path is None:
        return None
    step = read_progress(path).step
    exported = not config.checkpoint.export_hf or run_dir.exported_step() == step
    return step if step >= config.train.steps and exported else None


def complete_ones(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder. A machine that lost its power may have left an empty file."""
    return [file.parent for file in folder.glob(f"step_*/{PROGRESS}") if file.stat().st_size]


def read_progress(path: Path) -> Progress:
    """How far the run had come in a checkpoint.

    Raises:
        UserError: ``path`` is not a complete checkpoint.
    """
    file = path / PROGRESS
    if not file.is_file():
        raise UserError(
            f"{path}: not a complete checkpoint (no {PROGRESS}); checkpoint.resume is never, auto, or a folder such as "
            "checkpoints/step_000050 of a run"
        )
    return Progress(**read_json(file, _Progress, "resume from another checkpoint").model_dump())
