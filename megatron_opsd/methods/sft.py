"""Supervised fine-tuning on the data's solutions: the student learns to write what the teacher of OPSD only reads."""

from collections.abc import Callable

from megatron_opsd.config import Config
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.objective import SampledToken, TokenLoss
from megatron_opsd.types import Grade, Group, Rollout


class SFT:
    """The log-likelihood of each solution after the student's prompt, the end of the turn included."""

    def __init__(self, config: Config, prompts: PromptBuilder, sampler: Sampler) -> None:
        self._problems, self._prompts, self._sampler = config.train.global_batch_size, prompts, sampler
        self.loss: TokenLoss = SampledToken()  # advantage 1: the log-likelihood

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        return [
            Group(
                example,
                self._prompts.student(example),
                [Rollout(self._prompts.solution(example), [], "stop", step)],
                [Grade.UNKNOWN],
            )
            for example in self._sampler.next_batch(self._problems)
        ]

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [Sample(group.prompt, None, rollout) for group in groups for rollout in group.rollouts]
