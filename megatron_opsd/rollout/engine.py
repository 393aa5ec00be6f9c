"""The interface of a rollout engine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_opsd.types import Rollout


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_k -1 keeps all tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


class NoServerLeftError(RuntimeError):
    """No rollout server is left to write rollouts or to take weights. The message says how each one failed."""


class RefitError(RuntimeError):
    """vLLM's weights differ from the student's. The message names the tensor or the tokens that differ."""


class Engine(Protocol):
    """All ranks call each method together.

    finished: how many responses of the last ``generate`` are written, as far as this rank can tell.
    """

    finished: int

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        should_abort: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """One rollout per prompt, in order; the same list on every rank.

        seeds: one per prompt. A rollout depends on its prompt, its seed and the weights, not on other prompts.
        should_abort: called now and then on each rank.

        Raises:
            StepAbortedError: on all ranks, if ``should_abort`` was true on one while rollouts were still missing.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a whole set of weights under their Hugging Face names. Later rollouts get the weight ``version``."""
        ...

    def sleep(self) -> None:
        """Free the device's memory for training. This drops the weights and the KV cache."""
        ...

    def wake_up_weights(self) -> None:
        """Allocate memory for the weights. They must then be refitted."""
        ...

    def wake_up_kv_cache(self) -> None:
        """Allocate memory for the KV cache, after the refit has freed its buckets."""
        ...

    def sleeping_bytes(self) -> int:
        """Bytes that sleep on this rank although torch's allocator still counts them as this engine's."""
        ...

    def close(self) -> None:
        """Shut the engine down; sleeping memory is woken first. Call once, on all ranks."""
        ...


class AlwaysAwake:
    """Sleep methods for an :class:`Engine` that uses no memory of the training processes' devices: they do nothing."""

    finished = 0

    def sleep(self) -> None: ...

    def wake_up_weights(self) -> None: ...

    def wake_up_kv_cache(self) -> None: ...

    def sleeping_bytes(self) -> int:
        return 0


class NoEngine(AlwaysAwake):
    """Of a run that writes no responses."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        should_abort: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        raise AssertionError("this run has no engine")

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise AssertionError("this run has no engine")

    def close(self) -> None: ...


def sample_seed(seed: int, step: int, sample: int) -> int:
    """A 63-bit seed for one sample of one step, independent of the rank and the engine (splitmix64 of the three)."""
    state = 0
    for value in (seed, step, sample):
        state = (state ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
