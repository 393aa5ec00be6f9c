"""What the trainer asks of a rollout engine."""

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
    """No rollout server is left to write rollouts or to take weights: the message says what became of each."""


class RefitError(RuntimeError):
    """What vLLM holds is not what the student holds. The message names the tensor or the tokens that differ."""


class Engine(Protocol):
    """Every rank calls each method together with all others."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        should_abort: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """One rollout a prompt, in order, the same list on every rank.

        seeds: one a prompt; a rollout depends on its prompt, seed and the weights, not on its neighbours.
        should_abort: asked now and then, on each rank.

        Raises:
            AbandonedError: on all ranks, where ``should_abort`` was true on one and rollouts were still missing.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a whole set of weights under their Hugging Face names; rollouts carry ``version`` from now on."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back to training: weights and KV cache are dropped."""
        ...

    def wake_up_weights(self) -> None:
        """Make room for weights, which must then be refitted."""
        ...

    def wake_up_kv_cache(self) -> None:
        """Make room for the KV cache, after the refit has freed its buckets."""
        ...

    def sleeping_bytes(self) -> int:
        """Bytes that the device's allocator counts as this engine's although they sleep, on this rank."""
        ...

    def close(self) -> None:
        """Leave the engine; what sleeps is woken first. Call once, on all ranks."""
        ...


class AlwaysAwake:
    """The part of an :class:`Engine` that holds no memory of the training processes' devices: there is none to give."""

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
    """A 63-bit seed of one sample of one step, whatever rank or engine writes it (splitmix64 of the three)."""
    state = 0
    for value in (seed, step, sample):
        state = (state ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
