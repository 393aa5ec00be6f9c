"""Off-policy distillation: the teacher says what should come next along responses that are not the student's.

``responses = "teacher"``: the weights that the run starts from write them once, with the reference solution in their
prompt, before the first step; they stay in the run's folder, and a run that goes on writes what is still missing.
``responses = "data"``: the data's solutions. Either way the student sees the problem alone, and the loss is the
divergence from the teacher, who sees the solution too (Hinton et al., arXiv 1503.02531, token by token).

It cannot show the student its own mistakes, as sft cannot. All responses are learned from, right or wrong.
"""

import copy
from collections.abc import Callable

from megatron_opsd.config import Config, DistillConfig
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import Writer, solutions
from megatron_opsd.methods.losses import divergence
from megatron_opsd.methods.method import Method
from megatron_opsd.methods.written import BLOCK, WrittenResponses
from megatron_opsd.objective import TokenLoss
from megatron_opsd.types import Grade, Group


class Distill(Method):
    def __init__(self, config: Config, method: DistillConfig, sampler: Sampler, writer: Writer) -> None:
        self._sampler, self._prompts = sampler, writer.prompts
        self._problems = config.train.global_batch_size // config.rollout.samples_per_prompt
        self._written = WrittenResponses(writer) if method.responses == "teacher" else None
        self.loss: TokenLoss = divergence(config)

    def prepare(self, steps: int, ready_engine: Callable[[], None], should_abort: Callable[[], bool]) -> int:
        if not self._written:
            return 0
        missing = self._written.missing(copy.copy(self._sampler).next_batch(steps * self._problems))
        if missing:
            ready_engine()
            self._written.write(missing[:BLOCK], should_abort)
        return len(missing[BLOCK:])

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        examples = self._sampler.next_batch(self._problems)
        if not self._written:
            return solutions(examples, self._prompts, step)
        groups = []
        for example in examples:
            rollouts = self._written.read(example, step)
            grades = [Grade.UNKNOWN] * len(rollouts)
            groups.append(Group(example, self._prompts.student(example), rollouts, grades, solution_in_sight=True))
        return groups

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [
            Sample(group.prompt, self._prompts.teacher(group.example), rollout)
            for group in groups
            for rollout in group.rollouts
        ]
