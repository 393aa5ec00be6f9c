"""Save and resume: student, optimizer and `Progress` (step, sampler, guards, the teacher's identity), in any layout.

Random states need not be saved: every step draws from generators seeded by (seed, step, sample).

A checkpoint is written in the background. It gets its name when all of it is on the disk. It has a checksum of every
file, which is verified before anything is loaded.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opsd import events
from megatron_opsd.compat.megatron_internals import report_through
from megatron_opsd.config import CheckpointConfig
from megatron_opsd.errors import UserError
from megatron_opsd.model.gpt import ModelChunks
from megatron_opsd.model.parallel import on_rank_0
from megatron_opsd.model.teacher import Teacher
from megatron_opsd.reliability import pickles
from megatron_opsd.reliability.preemption import serve_parent
from megatron_opsd.reliability.resume import PROGRESS, choose, complete_ones, read_progress
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.types import Progress

T = TypeVar("T")

# The format that any layout can load. "mem_efficient" gathers the states through gloo into the host memory of one
# data-parallel rank; otherwise everything would be gathered on every rank's device.
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_MODEL, _TEACHER = "model.", "teacher."
_CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of a run. All ranks call each method together."""

    def __init__(self, run_dir: RunDir, config: CheckpointConfig) -> None:
        self._folder, self._config = run_dir.checkpoints, config
        self._writers = AsyncCallsQueue()
        _start_results_queue()
        self._begun: int | None = None  # the step whose save is in progress
        self.saved_step = 0  # step of the newest complete checkpoint; 0 for none
        self.seconds = math.inf  # duration of the last save, from its start to its last byte; inf while unknown
        if dist.get_rank() == 0:
            for leftover in self._folder.glob(".step_*"):  # from a start that was killed: the folder is this run's
                shutil.rmtree(leftover, ignore_errors=True)
        dist.barrier()

    def save(
        self,
        model_chunks: ModelChunks,
        optimizer: MegatronOptimizer,
        teacher: Teacher | None,
        progress: Progress,
        keep: int | None,
    ) -> None:
        """Start to write a checkpoint. After the return the state may change: a copy is in host memory.

        keep: a step whose checkpoint is kept in addition to those that the configuration keeps.

        Raises:
            SaveError: the previous save has failed.
        """
        self.finish()
        self._begun, start = progress.step, time.monotonic()
        # A unique name: an orphan process of a killed run may still write into a folder of the same step.
        names = [f".step_{progress.step:06d}.{time.time_ns():x}"]
        dist.broadcast_object_list(names)
        staging = self._folder / names[0]
        self._on_rank_0(lambda: _make_room(staging))
        request = dist_checkpointing.save(
            _state(model_chunks, optimizer, teacher, loading=False),
            str(staging),
            async_sharded_save=True,
            content_metadata=_OPTIMIZER_FORMAT,
        )
        assert request is not None
        if request.async_fn is not None:
            request = request._replace(async_fn=_Writer(request.async_fn, staging, dist.get_rank(), start))
        request.add_finalize_fn(partial(self._complete, staging, deepcopy(progress), keep))
        self._writers.schedule_async_request(request)

    def finish(self) -> bool:
        """Wait for the save in progress, if any, and complete it. Returns whether there was one.

        Raises:
            SaveError: it could not be written. The earlier checkpoints are unchanged.
        """
        if self._begun is None:
            return False
        try:
            self._writers.maybe_finalize_async_calls(blocking=True)
        except CheckpointException as error:  # rank 0's has the reasons
            reasons = {" ".join(str(failure[0]).split()) for failure in error.failures.values()}
            raise self._failed("; ".join(sorted(reasons))) from None
        events.record("saved", step=self._begun, seconds=round(self.seconds, 3))
        self.saved_step, self._begun = self._begun, None
        return True

    def _complete(self, staging: Path, progress: Progress, keep: int | None) -> None:
        self.seconds = self._on_rank_0(lambda: self._name(staging, progress, keep))

    def _name(self, staging: Path, progress: Progress, keep: int | None) -> float:
        """Give the checkpoint its name after all ranks have written. Returns the seconds of the slowest rank."""
        checksums: dict[str, int] = {}
        seconds = []
        for file in staging.glob("*.part"):
            part = json.loads(file.read_text())
            checksums |= part["checksums"]
            seconds.append(part["seconds"])
            file.unlink()
        for file in staging.iterdir():
            if file.suffix == ".distcp" and file.name not in checksums:
                raise OSError(f"the writer of {file.name} did not get to its end")
            checksums.setdefault(file.name, file_checksum(file))
        (staging / _CHECKSUMS).write_text(json.dumps(checksums))
        with (staging / PROGRESS).open("w") as file:
            file.write(json.dumps(asdict(progress)))
            file.flush()
            os.fsync(file.fileno())  # it has no checksum: it must not be the last to reach the disk
        target = self._folder / f"step_{progress.step:06d}"
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        self._remove_old(keep)
        return max(seconds)

    def _remove_old(self, keep: int | None) -> None:
        last, every = self._config.keep_last, self._config.keep_every
        complete = sorted(complete_ones(self._folder))
        for path in complete[:-last] if last else []:
            step = read_progress(path).step
            if step != keep and not (every and step % every == 0):
                doomed = path.rename(path.with_name(f".{path.name}.removed"))  # its name never means half of it
                shutil.rmtree(doomed, ignore_errors=True)

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        try:
            return on_rank_0(action)
        except UserError as refused:
            raise self._failed(str(refused)) from None

    def _failed(self, why: str) -> "SaveError":
        assert self._begun is not None
        step, self._begun = self._begun, None
        if dist.get_rank() == 0:
            free = shutil.disk_usage(self._folder).free  # torch's message may hide that the disk is full
            why += f" ({free / 2**30:.1f} GiB free)"
            for staging in self._folder.glob(f".step_{step:06d}.*"):
                shutil.rmtree(staging, ignore_errors=True)  # to free its space for the next save
        return SaveError(f"{self._folder}: the checkpoint of step {step} could not be written: {why}")


class SaveError(UserError):
    """A checkpoint could not be written. The message says in one line which and why."""


@dataclass(frozen=True)
class _Writer:
    """Megatron's writer of a rank's files, followed by their checksums. Runs in a separate process."""

    write: Callable[..., None]
    staging: Path
    rank: int
    start: float  # time.monotonic() at the start of the save

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.write(*args, **kwargs)
        checksums = {file.name: file_checksum(file) for file in self.staging.glob(f"__{self.rank}_*.distcp")}
        with contextlib.suppress(OSError):  # a full disk: Megatron reports its own error, or _name misses this file
            part = {"seconds": time.monotonic() - self.start, "checksums": checksums}
            (self.staging / f"{self.rank}.part").write_text(json.dumps(part))


def _start_results_queue() -> None:
    """Start the process through which Megatron's writers report. It ignores the signals that ask for a save."""
    manager = SyncManager(ctx=get_context("spawn"))
    manager.start(serve_parent)
    report_through(manager)


def _make_room(staging: Path) -> None:
    """Make the folder and check that the small files fit: Megatron does not handle errors when it writes them."""
    staging.mkdir(parents=True)
    probe = staging / "probe"
    probe.write_bytes(bytes(1 << 20))
    probe.unlink()


def file_checksum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as data:
        while chunk := data.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def damage(path: Path) -> list[str]:
    """Files that are missing or have changed, one line each. All ranks call this; each reads its share of the files."""
    expected = json.loads((path / _CHECKSUMS).read_text()) if (path / _CHECKSUMS).is_file() else {}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = [] if expected else [f"{path / _CHECKSUMS} is missing"]
    for name in sorted(expected)[rank::world_size]:
        if not (path / name).is_file():
            found.append(f"{path / name} is missing")
        elif (now := file_checksum(path / name)) != expected[name]:
            found.append(f"{path / name} is damaged (checksum {now:08x} instead of {expected[name]:08x})")
    gathered: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(gathered, found)
    return list(dict.fromkeys(line for part in gathered for line in part))


def load(path: Path, model_chunks: ModelChunks, optimizer: MegatronOptimizer, teacher: Teacher | None) -> None:
    """Load student, optimizer and an ema teacher's average from a checkpoint written by any layout."""
    state: Any = dist_checkpointing.load(_state(model_chunks, optimizer, teacher, loading=True), str(path))
    _fill(model_chunks, state[_MODEL], _MODEL)
    if teacher and (average := teacher.average()):
        _fill(average, state[_TEACHER], _TEACHER)
        teacher.publish()
    optimizer.load_state_dict(state["optimizer"])


def _fill(model_chunks: ModelChunks, states: list[dict[str, Any]], prefix: str) -> None:
    for chunk, state in zip(model_chunks, states, strict=True):
        weights = {name.removeprefix(prefix): value for name, value in state.items()}
        missing, unexpected = chunk.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert all(name.endswith("_extra_state") for name in missing), missing  # Transformer Engine's, only for fp8


def find(run_dir: RunDir, resume: str) -> Path | None:
    """The undamaged checkpoint that ``checkpoint.resume`` selects: none, the newest, or the one in a directory.

    If the newest one is damaged, it is renamed and the one before it is taken. All ranks call this.

    Raises:
        UserError: the given directory is not a complete checkpoint or is damaged, all checkpoints are damaged, or the
            run is new and its folder has checkpoints of an earlier one.
    """
    folder = run_dir.checkpoints
    while True:
        path = on_rank_0(lambda: choose(run_dir, resume))
        if path is None:
            return None
        if not (damages := damage(path)):
            on_rank_0(partial(pickles.refuse_foreign, path))
            return path
        if resume != "auto" or on_rank_0(lambda: len(complete_ones(folder))) == 1:
            raise UserError(
                f"{'; '.join(damages)}; resume from another checkpoint, or choose another --logging.run_dir"
            )
        on_rank_0(partial(_set_aside, path))
        if dist.get_rank() == 0:
            print(f"opsd: {'; '.join(damages)}; going on from the checkpoint before", file=sys.stderr, flush=True)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _state(
    model_chunks: ModelChunks, optimizer: MegatronOptimizer, teacher: Teacher | None, loading: bool
) -> dict[str, Any]:
    weights = _weights(model_chunks, _MODEL)
    optimizer_state = optimizer.sharded_state_dict(
        {_MODEL: weights},
        is_loading=loading,
        metadata=_OPTIMIZER_FORMAT,  # type: ignore[call-arg]
    )
    state = {_MODEL: weights, "optimizer": optimizer_state}
    if teacher and (average := teacher.average()):
        state[_TEACHER] = _weights(average, _TEACHER)
    return state


def _weights(model_chunks: ModelChunks, prefix: str) -> list[dict[str, Any]]:
    """The tensors of each chunk; ``prefix`` is part of their names in the checkpoint, the chunk is not."""
    return [chunk.sharded_state_dict(prefix=prefix) for chunk in model_chunks]  # pyright: ignore
