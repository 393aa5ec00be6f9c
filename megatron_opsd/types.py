"""The records that travel through one training step. No torch here: configuration and data tools import it too."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """The parts of a step, in their order: metrics, ``[timeouts]``, events and the plan call them so."""

    ROLLOUT = "rollout"
    TEACHER = "teacher"
    STUDENT = "student"
    OPTIMIZER = "optimizer"
    REFIT = "refit"


@dataclass(frozen=True, slots=True)
class Example:
    """One problem with its reference solution.

    `index` is the row in the data set, counted from 0 before any row is dropped, so it names the same row in every
    run. `answer` is the final answer as text, or None where the data gives none. `difficulty` is the data's own, where
    it has one; higher is harder.
    """

    index: int
    problem: str
    solution: str
    answer: str | None = None
    difficulty: float | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response as the engine sampled it.

    `token_ids` ends with the end-of-turn token when the student wrote it (`finish_reason` "stop"); a response cut at
    the token limit has `finish_reason` "length". `logprobs` are natural logs at temperature 1, one per token; none of a
    response that was not sampled from the student's prompt. `weight_version` is the version of the weights that wrote
    all of the response.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int


class Grade(StrEnum):
    """What is known of a response's final answer."""

    RIGHT = "right"
    WRONG = "wrong"
    UNFINISHED = "unfinished"  # cut at the token limit
    UNKNOWN = "unknown"  # the data has no answer to compare with


@dataclass(frozen=True, slots=True)
class Group:
    """One problem, the student's prompt as token ids, and its responses with their grades.

    `solution_in_sight`: who wrote these responses saw the solution; the student is not judged by them.
    """

    example: Example
    prompt: list[int]
    rollouts: list[Rollout]
    grades: list[Grade]
    solution_in_sight: bool = False

    @property
    def has_signal(self) -> bool:
        """Whether some of the responses are right and some are not."""
        return 0 < self.grades.count(Grade.RIGHT) < len(self.grades)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One training step: its numbers under the names of metrics.jsonl, and the groups it was made of."""

    metrics: dict[str, float]
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    `greedy` and `average` are shares of right answers: of the greedy ones, and of all sampled ones (Avg@k).
    `response_length` is the mean number of tokens. `records` holds one dict for each response, greedy ones first.
    """

    greedy: float
    average: float
    response_length: float
    records: list[dict[str, Any]]

    def scores(self) -> dict[str, float]:
        """The numbers without the responses."""
        return {"greedy": self.greedy, "average": self.average, "response_length": self.response_length}


@dataclass(slots=True)
class Progress:
    """The state of a run besides weights and optimizer: saved and restored whole.

    teacher: identity of a frozen teacher's weights, or what kind another is.
    sampler: its state after ``step`` steps.
    step: how many are done, which is also the version of the student's weights.
    evaluated_step: that of the last evaluation; -1 for none.
    guards: their state.
    entropy_threshold: what a token's entropy must reach in the next step to be learned from, in nats; None for all.
    meaning: the settings that make it this training, by their dotted names.
    """

    teacher: str
    sampler: dict[str, Any]
    step: int = 0
    evaluated_step: int = -1
    guards: dict[str, Any] = field(default_factory=dict)
    entropy_threshold: float | None = None
    meaning: dict[str, Any] = field(default_factory=dict)
