"""Save and resume: student, optimizer, schedule, sampler, step and the teacher's identity, in any layout.

Random numbers need no saving: every step draws from generators seeded by (seed, step, sample).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer

from megatron_opsd.errors import UserError
from megatron_opsd.model import HiddenStateGPT

# The format that any layout can load. Gathered through gloo into the host memory of one data-parallel rank; the other
# way would gather everything on every rank's device.
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


@dataclass(frozen=True)
class Progress:
    """What a run needs beside weights and optimizer states to go on."""

    step: int
    sampler: dict[str, Any]
    teacher: str


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def save(run_dir: Path, model: HiddenStateGPT, optimizer: MegatronOptimizer, progress: Progress) -> Path:
    """Write a checkpoint; it gets its name only when it is complete. All ranks call this."""
    target = checkpoint_dir(run_dir, progress.step)
    staging = target.with_name(f".{target.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(model, optimizer, loading=False), str(staging), content_metadata=_OPTIMIZER_FORMAT)
    dist.barrier()
    if dist.get_rank() == 0:
        (staging / "progress.json").write_text(json.dumps(vars(progress)))
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    dist.barrier()
    return target


def load(path: Path, model: HiddenStateGPT, optimizer: MegatronOptimizer, teacher: str) -> Progress:
    """Fill student and optimizer from a checkpoint written by any layout.

    Raises:
        UserError: not a complete checkpoint, or its teacher is not this run's (``teacher``: its identity).
    """
    progress = read_progress(path)
    if progress.teacher != teacher:
        raise UserError(
            f"{path}: was trained with the teacher {progress.teacher[:16]}, but model.path holds {teacher[:16]}; "
            "resume with the model the run started from"
        )
    state: Any = dist_checkpointing.load(_state(model, optimizer, loading=True), str(path))
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing  # Transformer Engine's, only for fp8
    optimizer.load_state_dict(state["optimizer"])
    return progress


def read_progress(path: Path) -> Progress:
    file = path / "progress.json"
    if not file.is_file():
        raise UserError(f"{path}: not a complete checkpoint (no progress.json)")
    return Progress(**json.loads(file.read_text()))


def find(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` names: none, the newest complete one, or a directory.

    Raises:
        UserError: a named directory that is no complete checkpoint, or a new run where an old one left checkpoints.
    """
    newest = max(run_dir.glob("checkpoints/step_*/progress.json"), default=None)
    if resume == "never" and newest:
        raise UserError(
            f"{run_dir}: holds checkpoints of an earlier run; go on from them with --checkpoint.resume auto, or choose "
            "another --logging.run_dir"
        )
    if resume in ("never", "auto"):
        return newest.parent if newest else None
    step = read_progress(Path(resume)).step
    if newest and read_progress(newest.parent).step > step:
        raise UserError(
            f"{run_dir}: holds checkpoints newer than {resume}, which a later --checkpoint.resume auto would take; "
            "choose another --logging.run_dir, or move them away"
        )
    return Path(resume)


def _state(model: HiddenStateGPT, optimizer: MegatronOptimizer, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = model.sharded_state_dict(prefix="model.")
    optimizer_state = optimizer.sharded_state_dict(
        state,
        is_loading=loading,
        metadata=_OPTIMIZER_FORMAT,  # type: ignore[call-arg]
    )
    return {**state, "optimizer": optimizer_state}
