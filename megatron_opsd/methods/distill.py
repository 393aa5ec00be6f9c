"""Off-policy distillation: the teacher says what should come next along responses that are not the student's.

``responses = "teacher"``: the weights that the run starts from write them once, with the reference solution in their
prompt, before the first step; they stay in the run's folder, and a run that goes on writes what is still missing.
``responses = "data"``: the data's solutions. Either way the student sees the problem alone, and the loss is the
divergence from the teacher, who sees the solution too (Hinton et al., arXiv 1503.02531, token by token).

It cannot show the student its own mistakes, as sft cannot. All responses are learned from, right or wrong.
"""

import copy
from array import array
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_opsd.config import Config, DistillConfig
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import Writer, solutions
from megatron_opsd.methods.losses import divergence
from megatron_opsd.methods.method import Method
from megatron_opsd.model.parallel import on_rank_0
from megatron_opsd.objective import TokenLoss
from megatron_opsd.reliability.written import Responses, WrittenFile, digest
from megatron_opsd.rollout.engine import sample_seed
from megatron_opsd.types import Example, Grade, Group, Rollout

BLOCK = 256  # problems between two writes to the disk


class Distill(Method):
    def __init__(self, config: Config, method: DistillConfig, sampler: Sampler, writer: Writer) -> None:
        self._method, self._sampler, self._writer, self._prompts = method, sampler, writer, writer.prompts
        self._k, self._seed = config.rollout.samples_per_prompt, config.train.seed
        self._problems = config.train.global_batch_size // self._k
        self._file = WrittenFile(config)
        self._written: Responses | None = None
        self.loss: TokenLoss = divergence(config)

    def prepare(self, steps: int, ready_engine: Callable[[], None], should_abort: Callable[[], bool]) -> int:
        if self._method.responses == "data":
            return 0
        if self._written is None:
            self._written = on_rank_0(self._file.read)
        coming = copy.copy(self._sampler).next_batch(steps * self._problems)
        missing = list({digest(x): x for x in coming if digest(x) not in self._written}.values())
        if missing:
            ready_engine()
            self._write(missing[:BLOCK], self._written, should_abort)
        return len(missing[BLOCK:])

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        examples = self._sampler.next_batch(self._problems)
        if self._written is None:
            return solutions(examples, self._prompts, step)
        groups = []
        for example in examples:
            written = self._written[digest(example)]
            rollouts = [Rollout(ids.tolist(), [], reason, step) for ids, reason in written]
            grades = [Grade.UNKNOWN] * len(rollouts)
            groups.append(Group(example, self._prompts.student(example), rollouts, grades, solution_in_sight=True))
        return groups

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [
            Sample(group.prompt, self._prompts.teacher(group.example), rollout)
            for group in groups
            for rollout in group.rollouts
        ]

    def _write(self, examples: Sequence[Example], written: Responses, should_abort: Callable[[], bool]) -> None:
        repeated = [example for example in examples for _ in range(self._k)]
        asked = [self._prompts.with_solution(example) for example in repeated]
        # By problem, not by place: a problem has the same responses whatever else is asked.
        seeds = [sample_seed(self._seed, 0, x.index * self._k + i % self._k) for i, x in enumerate(repeated)]
        rollouts, grades = self._writer.write(repeated, asked, seeds, should_abort)
        if dist.get_rank() == 0:
            self._file.append(repeated, rollouts, grades)
        for example, rollout in zip(repeated, rollouts, strict=True):
            response = array("i", rollout.token_ids), rollout.finish_reason
            written.setdefault(digest(example), []).append(response)
