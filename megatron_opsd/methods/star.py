"""Self-Taught Reasoner (arXiv 2203.14465): fine-tuning on the student's own right answers.

The student answers; where it fails, it answers once more with the reference solution in its prompt (rationalisation).
Right answers of both kinds are learned from, by their log-likelihood after the prompt without the solution.

Departures: the prompt of a rationalisation shows the whole solution (there: the answer as a hint) in the wording of
``prompts.teacher_template``; the weights go on from step to step (there: each round begins from the first model);
answers are sampled, with ``rollout.temperature`` (there: greedy). It cannot learn from a wrong answer that it did
not correct, and it does not say where an answer went wrong.
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_opsd.config import Config, StarConfig
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import Writer
from megatron_opsd.methods.losses import log_likelihood
from megatron_opsd.methods.method import Method
from megatron_opsd.objective import TokenLoss
from megatron_opsd.rollout.engine import sample_seed
from megatron_opsd.types import Grade, Group


class STaR(Method):
    def __init__(self, config: Config, method: StarConfig, sampler: Sampler, writer: Writer) -> None:
        self._method, self._sampler, self._writer = method, sampler, writer
        self._seed, self._responses = config.train.seed, config.train.global_batch_size
        self._problems = config.problems_per_step
        self.loss: TokenLoss = log_likelihood()

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        groups = self._writer.answer(self._sampler.next_batch(self._problems), step, should_abort)
        return groups + self._rationalize(groups, step, should_abort) if self._method.rationalize else groups

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [
            Sample(group.prompt, None, rollout)
            for group in groups
            for rollout, grade in zip(group.rollouts, group.grades, strict=True)
            if grade == Grade.RIGHT
        ]

    def _rationalize(self, groups: list[Group], step: int, should_abort: Callable[[], bool]) -> list[Group]:
        """For each failed answer another one, written with the solution in sight."""
        failed = [
            (number, group)
            for number, (group, grade) in enumerate((group, grade) for group in groups for grade in group.grades)
            if grade in (Grade.WRONG, Grade.UNFINISHED)
        ]
        examples = [group.example for _, group in failed]
        prompts = [self._writer.prompts.with_solution(example) for example in examples]
        seeds = [sample_seed(self._seed, step + 1, self._responses + number) for number, _ in failed]
        rollouts, grades = self._writer.write(examples, prompts, seeds, should_abort)
        return [
            Group(group.example, group.prompt, [replace(rollout, logprobs=[])], [grade], solution_in_sight=True)
            for (_, group), rollout, grade in zip(failed, rollouts, grades, strict=True)
        ]
