"""The records that travel through one training step. No torch here: configuration and data tools import it too."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One problem with its reference solution.

    `index` is the row in the data set, counted from 0 before any row is dropped, so it names the same row in every
    run. `answer` is the final answer as text, or None where the data gives none.
    """

    index: int
    problem: str
    solution: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response as the engine sampled it.

    `token_ids` ends with the end-of-turn token when the student wrote it (`finish_reason` "stop"); a response cut at
    the token limit has `finish_reason` "length". `logprobs` are natural logs at temperature 1, one per token.
    `weight_version` is the version of the weights that wrote all of the response.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """One training step: its numbers under the names of metrics.jsonl, and the examples and rollouts it was made of.

    `correct` says of each rollout whether its answer is right, None where the example has no answer.
    """

    metrics: dict[str, float]
    examples: list[Example]
    rollouts: list[Rollout]
    correct: list[bool | None]


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
