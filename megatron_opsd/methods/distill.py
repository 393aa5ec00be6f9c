"""Off-policy distillation: the teacher says what should come next along responses that are not the student's.

``responses = "teacher"``: the weights that the run starts from write them once, with the reference solution in their
prompt, before the first step; they stay in the run's folder, and a run that goes on writes what is still missing.
``responses = "data"``: the data's solutions. Either way the student sees the problem alone, and the loss is the
divergence from the teacher, who sees the solution too (Hinton et al., arXiv 1503.02531, token by token).

Like sft, it cannot show the student its own mistakes. All responses are learned from, right or wrong.
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
from megatron_opsd.reliability.written import Response, Responses, WrittenFile, digest
from megatron_opsd.rollout.engine import sample_seed
from megatron_opsd.types import Example, Group, Rollout


class Distill(Method):
    def __init__(self, config: Config, method: DistillConfig, sampler: Sampler, writer: Writer) -> None:
        self._config, self._sampler, self._writer, self._prompts = config, sampler, writer, writer.prompts
        self._file = WrittenFile(config)
        self._written: Responses | None = None  # from the first `prepare` on
        self._missing: list[Example] = []
        self._uses_data = method.responses == "data"
        self.loss: TokenLoss = divergence(config)

    def prepare(self, steps: int, ready_engine: Callable[[], None], should_abort: Callable[[], bool]) -> int:
        if self._uses_data:
            return 0
        if self._written is None:
            known = self._written = on_rank_0(self._file.read)
            coming = copy.copy(self._sampler).next_batch(steps * self._config.problems_per_step)
            self._missing = list({digest(x): x for x in coming if digest(x) not in known}.values())
        if self._missing:
            ready_engine()
            block = self._problems_at_once()
            self._write(self._missing[:block], self._written, should_abort)
            self._missing = self._missing[block:]
        return len(self._missing)

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        examples = self._sampler.next_batch(self._config.problems_per_step)
        if self._written is None:
            return solutions(examples, self._prompts, step)
        groups = []
        for example in examples:
            written = self._written[digest(example)]
            rollouts = [Rollout(x.token_ids.tolist(), [], x.finish_reason, step) for x in written]
            grades = [x.grade for x in written]
            groups.append(Group(example, self._prompts.student(example), rollouts, grades, solution_in_sight=True))
        return groups

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [
            Sample(group.prompt, self._prompts.teacher(group.example), rollout)
            for group in groups
            for rollout in group.rollouts
        ]

    def _problems_at_once(self) -> int:
        """As many as all engines write at the same time."""
        settings = self._config.rollout
        engines = len(settings.servers) or dist.get_world_size() // settings.tensor_model_parallel_size
        return max(1, engines * settings.max_num_seqs // settings.samples_per_prompt)

    def _write(self, examples: Sequence[Example], written: Responses, should_abort: Callable[[], bool]) -> None:
        k, seed = self._config.rollout.samples_per_prompt, self._config.train.seed
        repeated = [example for example in examples for _ in range(k)]
        asked = [self._prompts.with_solution(example) for example in repeated]
        # By problem, not by place: a problem has the same responses whatever else is asked.
        seeds = [sample_seed(seed, 0, example.index * k + i % k) for i, example in enumerate(repeated)]
        rollouts, grades = self._writer.write(repeated, asked, seeds, should_abort)
        on_rank_0(lambda: self._file.append(repeated, rollouts, grades))
        for example, rollout, grade in zip(repeated, rollouts, grades, strict=True):
            response = Response(array("i", rollout.token_ids), rollout.finish_reason, grade)
            written.setdefault(digest(example), []).append(response)
