"""What lies on a GPU in each part of a step. Rollouts and training take turns on the same device.

=============  ======================================================================================
rollout        vLLM: weights and KV cache; evaluations too
teacher        the teacher (vLLM sleeps at level 2: nothing of it is left)
student        the student's gradients
optimizer      the student's gradients, the optimizer's states
refit          vLLM: weights, and one bucket of the student's; the KV cache wakes when that is free again
exit           nothing, so that vLLM can wake when it is closed: its memory must be awake when the process ends
=============  ======================================================================================

The student's weights and the teacher's LM head are always there. So is all of the teacher, unless ``teacher.placement``
is "offload", and so are gradients and optimizer states, unless ``optim.placement`` is. On a CPU nothing moves.
"""

import resource
import time
from collections.abc import Callable

import torch

from megatron_opsd import events
from megatron_opsd.model import parallel
from megatron_opsd.model.optimizer import OptimizerStates
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import Teacher
from megatron_opsd.rollout.engine import Engine


class DeviceMemory:
    """Each method makes room for a phase and brings what it needs. Each move is an event, with its seconds.

    The watchdog counts a move to the phase before it.
    """

    def __init__(self, engine: Engine, teacher: Teacher | None, student: Student, states: OptimizerStates) -> None:
        self._engine, self._teacher, self._student, self._states = engine, teacher, student, states
        self._training = True  # something of a step that vLLM has no room for may be on the device
        self._peak = 0  # bytes
        self.seconds = 0.0  # of all moves

    def for_rollout(self) -> None:
        """Also for evaluations."""
        self._begin_phase()
        self._move("KV cache on", self._engine.wake_up_kv_cache)

    def for_teacher(self) -> None:
        self._begin_phase()
        self._training = True
        self._move("vLLM off", self._engine.sleep)
        if self._teacher:
            self._move("teacher on", self._teacher.load)

    def for_student(self) -> None:
        self._begin_phase()
        self._teacher_off()
        if self._states.offloads:
            for ddp in self._student.ddp_chunks:
                self._move("gradients on", ddp.restore_grad_buffers)

    def for_optimizer(self) -> None:
        self._begin_phase()
        self._move("optimizer states on", self._states.load)

    def without_training(self) -> None:
        """In place of what lies between the rollout and the refit."""
        self._begin_phase()
        self._move("vLLM off", self._engine.sleep)

    def for_refit(self) -> None:
        self._begin_phase()
        self._clear()
        self._begin_phase()  # vLLM's weights are never there together with what went
        self._move("vLLM's weights on", self._engine.wake_up_weights)

    def after_training(self) -> None:
        """In place of a refit, where the next step writes no rollouts."""
        self._begin_phase()
        self._clear()

    def for_exit(self) -> None:
        """Room for vLLM, whose memory must be awake when the process ends; a step may have been given up half-way."""
        self._begin_phase()
        if self._training:
            self._teacher_off()
            self._clear()

    def peak_gib(self) -> float:
        """Peak memory since the start: what training and vLLM held on the GPU, or the process's on a CPU."""
        if not torch.cuda.is_available():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return max(self._peak, self._phase_peak()) / 2**30

    def _begin_phase(self) -> None:
        self._peak = max(self._peak, self._phase_peak())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _phase_peak(self) -> int:
        """Bytes since the phase began. The allocator also counts vLLM's pools while they sleep and hold no memory."""
        if not torch.cuda.is_available():
            return 0
        return torch.cuda.max_memory_allocated(parallel.device()) - self._engine.sleeping_bytes()

    def _teacher_off(self) -> None:
        if self._teacher:
            self._move("teacher off", self._teacher.offload)

    def _clear(self) -> None:
        """What training alone needs goes."""
        if not self._training:
            return
        self._move("optimizer states off", self._states.offload)
        if self._states.offloads:
            for ddp in self._student.ddp_chunks:
                self._move("gradients off", ddp.offload_grad_buffers)
        self._training = False

    def _move(self, what: str, move: Callable[[], None]) -> None:
        if not torch.cuda.is_available():
            move()
            return
        before, start = _free_gib(), time.perf_counter()
        move()
        after, seconds = _free_gib(), time.perf_counter() - start
        self.seconds += seconds
        free_gib = [round(before, 2), round(after, 2)]
        events.record("move", what=what, seconds=round(seconds, 3), free_gib=free_gib)


def _free_gib() -> float:
    """What vLLM could take: it gets its memory from the driver, not from torch's cache, so that is emptied first."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free / 2**30
