"""Supervised fine-tuning on the data's solutions: the student learns to write what the teacher of OPSD only reads.

The log-likelihood of each solution after the student's prompt, the end of the turn included. Departure from the paper:
all parameters learn (there: LoRA). It cannot show the student its own mistakes: every token follows a prefix that
somebody else wrote, and solutions in another style than the model's pull it away from its own.
"""

from collections.abc import Callable

from megatron_opsd.config import Config
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import solutions
from megatron_opsd.methods.losses import log_likelihood
from megatron_opsd.methods.method import Method
from megatron_opsd.objective import TokenLoss
from megatron_opsd.types import Group


class SFT(Method):
    def __init__(self, config: Config, sampler: Sampler, prompts: PromptBuilder) -> None:
        self._problems, self._sampler, self._prompts = config.train.global_batch_size, sampler, prompts
        self.loss: TokenLoss = log_likelihood()

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        return solutions(self._sampler.next_batch(self._problems), self._prompts, step)

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [Sample(group.prompt, None, rollout) for group in groups for rollout in group.rollouts]
