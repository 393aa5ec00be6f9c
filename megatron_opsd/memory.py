"""What lies on a GPU in each part of a step. Rollouts and training take turns on the same device.

=============  ======================================================================================
rollout        vLLM: weights and KV cache
teacher        the teacher (vLLM sleeps at level 2: nothing of it is left)
student        the student's gradients
optimizer      the student's gradients, the optimizer's states
refit          vLLM: weights, and one bucket of the student's; the KV cache wakes when that is free again
=============  ======================================================================================

The student's weights and the teacher's LM head (``placement = "offload"``; otherwise all of the teacher, the gradients
and the optimizer's states) always stay. On a CPU nothing moves.
"""

import logging
import time
from collections.abc import Callable

import torch

from megatron_opsd.optim import OptimizerStates
from megatron_opsd.rollout.engine import Engine
from megatron_opsd.student import Student
from megatron_opsd.teacher import Teacher

log = logging.getLogger(__name__)


class DeviceMemory:
    """Moves things when a phase begins; each move is timed and logged with the memory that is free after it."""

    def __init__(self, engine: Engine, teacher: Teacher, student: Student, states: OptimizerStates) -> None:
        self._engine, self._teacher, self._student, self._states = engine, teacher, student, states
        self._offloads_gradients = states.offloads

    def enter(self, phase: str) -> None:
        """Make room for ``phase`` and bring what it needs."""
        match phase:
            case "rollout" | "evaluate":
                self._move("KV cache on", self._engine.wake_up_kv_cache)
            case "teacher":
                self._move("vLLM off", self._engine.sleep)
                self._move("teacher on", self._teacher.load)
            case "student":
                self._move("teacher off", self._teacher.offload)
                if self._offloads_gradients:
                    self._move("gradients on", self._student.ddp.restore_grad_buffers)
            case "optimizer":
                self._move("optimizer states on", self._states.load)
            case "refit":
                self._move("optimizer states off", self._states.offload)
                if self._offloads_gradients:
                    self._move("gradients off", self._student.ddp.offload_grad_buffers)
                self._move("vLLM's weights on", self._engine.wake_up_weights)

    def _move(self, what: str, move: Callable[[], None]) -> None:
        if not torch.cuda.is_available():
            move()
            return
        before, start = _free_gib(), time.perf_counter()
        move()
        after = _free_gib()
        log.info("%s: %.2f s, %.1f to %.1f GiB free", what, time.perf_counter() - start, before, after)


def _free_gib() -> float:
    """What vLLM could take: it gets its memory from the driver, not from torch's cache, so that is emptied first."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free / 2**30
