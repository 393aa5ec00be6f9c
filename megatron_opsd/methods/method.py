"""What a method is: where responses come from, which of them are learned from, and with which loss."""

from collections.abc import Callable
from typing import Protocol

from megatron_opsd.data.batch import Sample
from megatron_opsd.objective import TokenLoss
from megatron_opsd.types import Group


class Method(Protocol):
    """To add one: a class with these members."""

    loss: TokenLoss

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        """A step's problems, their responses and grades, the same on every rank; collective.

        step: how many are done, which is also the version of the weights that write.
        """
        ...

    def samples(self, groups: list[Group]) -> list[Sample]:
        """What is learned from them; may be empty."""
        ...

    def prepare(self, steps: int, ready_engine: Callable[[], None], should_abort: Callable[[], bool]) -> int:
        """Write some of what the next ``steps`` steps learn from with the weights that the run starts from; collective.

        ready_engine: gives the engine these weights.
        Returns how many problems are left; the run calls it until none is. Most methods need nothing.
        """
        return 0
