"""Which problems each batch draws, in an order that follows from the seed alone."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opsd.errors import UserError
from megatron_opsd.types import Example, Group


class Sampler:
    """Draws batches of examples without end, each epoch in an order of its own.

    The order follows from the seed and the epoch's number alone, so it is the same on every rank and for every
    parallel layout, and a resumed run goes on where it stopped, even with another batch size. A batch that reaches the
    end of an epoch is filled up from the next one.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        if not examples:
            raise ValueError("a sampler needs at least one example")
        self._examples = examples
        self._seed = seed
        self._digest = _digest(examples)
        self._start_epoch(0)

    @property
    def digest(self) -> str:
        """Identifies the problems, solutions and answers, in their order."""
        return self._digest

    def next_batch(self, size: int) -> list[Example]:
        """Return the next `size` examples."""
        batch: list[Example] = []
        while len(batch) < size:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            drawn = self._order[self._position : self._position + size - len(batch)]
            batch += [self._examples[index] for index in drawn]
            self._position += len(drawn)
        return batch

    def update(self, groups: Sequence[Group]) -> None:
        """Hear how the last batch's problems went. Nothing follows from it here."""

    def state_dict(self) -> dict[str, Any]:
        """The sampler's position, and what identifies its data, as plain JSON values."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any], allow_changes: bool = False) -> None:
        """Go on from where a sampler over the same data stood.

        Raises `UserError` for other data or another seed; with ``allow_changes`` their order begins instead.
        """
        for name, now in self._identity().items():
            before = state.get(name)
            if before != now and allow_changes:
                return
            if before != now:
                raise UserError(
                    f"cannot resume: the checkpoint's sampler had {name} {before}, this run has {now}; use the "
                    "first start's data, limits and seed, another --logging.run_dir, or --checkpoint.allow_changes true"
                )
        self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._start_epoch(int(state["epoch"]))
        self._position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "examples": len(self._examples), "digest": self._digest}

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = self._pool()
        # A text seed is hashed by Python in a fixed way, on every machine and in every process.
        random.Random(f"seed {self._seed} epoch {epoch}").shuffle(self._order)

    def _pool(self) -> list[int]:
        """Places of the examples that an epoch draws, each once."""
        return list(range(len(self._examples)))


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        identity = [example.problem, example.solution, example.answer]
        identity += [example.difficulty] if example.difficulty is not None else []
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()[:16]
