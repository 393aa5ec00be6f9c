"""Easy problems first: a sampler whose window grows as the student gets better."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opsd.config import CurriculumConfig, TrainConfig
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.types import Example, Grade, Group

STEPS = 5  # of which the mean accuracy decides


class CurriculumSampler(Sampler):
    """Draws from the easiest share of the problems: the window.

    How hard a problem is says the data (``Example.difficulty``), or else the share of right responses that the student
    has given to it so far; a problem it was never asked counts as the mean of those it was. Ties go by index. An epoch
    draws the problems that were in the window when it began, each once. Where the window grows, a new epoch begins.
    """

    def __init__(self, examples: Sequence[Example], seed: int, config: CurriculumConfig) -> None:
        self._config, self._window = config, config.window
        self._accuracies: list[float] = []  # of the last steps with this window
        self._tried: dict[int, list[int]] = {}  # by the example's place: right responses, and all
        self._places = {example.index: place for place, example in enumerate(examples)}
        super().__init__(examples, seed)

    @property
    def window(self) -> float:
        """Share of the problems that are drawn from."""
        return self._window

    def update(self, groups: Sequence[Group]) -> None:
        """Count the student's responses, and let the window grow where they were good enough."""
        right = known = 0
        for group in groups:
            grades = [grade for grade in group.grades if grade != Grade.UNKNOWN]
            if group.solution_in_sight or not grades:
                continue
            tried = self._tried.setdefault(self._places[group.example.index], [0, 0])
            tried[0] += grades.count(Grade.RIGHT)
            tried[1] += len(grades)
            right, known = right + grades.count(Grade.RIGHT), known + len(grades)
        if not known or self._window == 1:
            return
        self._accuracies = [*self._accuracies, right / known][-STEPS:]
        if len(self._accuracies) == STEPS and sum(self._accuracies) / STEPS > self._config.accuracy:
            self._window, self._accuracies = min(1.0, self._window + self._config.growth), []
            self._start_epoch(self._epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "order": self._order,
            "window": self._window,
            "accuracies": self._accuracies,
            "tried": {str(place): [*counts] for place, counts in self._tried.items()},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if "order" not in state:  # of a run without a curriculum: this one's order begins
            return
        super()._restore(state)
        self._order, self._window, self._accuracies = state["order"], state["window"], state["accuracies"]
        self._tried = {int(place): counts for place, counts in state["tried"].items()}

    def _pool(self) -> list[int]:
        difficulties = self._difficulties()
        by_ease = sorted(range(len(difficulties)), key=lambda place: (difficulties[place], place))
        return sorted(by_ease[: math.ceil(self._window * len(by_ease))])

    def _difficulties(self) -> list[float]:
        rates = {place: right / asked for place, (right, asked) in self._tried.items()}
        mean = sum(rates.values()) / len(rates) if rates else 0.0
        return [
            -rates.get(place, mean) if example.difficulty is None else example.difficulty
            for place, example in enumerate(self._examples)
        ]


def build_sampler(examples: Sequence[Example], config: TrainConfig) -> Sampler:
    """The sampler that ``train.curriculum`` asks for."""
    if config.curriculum is None:
        return Sampler(examples, config.seed)
    return CurriculumSampler(examples, config.seed, config.curriculum)
