"""On-Policy Self-Distillation (arXiv 2601.18734).

The student answers, and at each token of its answer the teacher, who also sees the reference solution, says what should
have come next. With context ``sibling`` the teacher sees another right answer of the student instead: with k answers to
a problem that is verified group self-distillation, which the paper leaves to future work (see SDPO, arXiv 2601.20802).

Departures from the paper: all parameters learn (there: LoRA), and the default clip is ``saturate`` (docs/evidence.md
says why). It cannot learn from a problem that the teacher cannot solve either: grades choose which answers are
learned from, but add no signal of their own.
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_opsd.config import Config, OpsdConfig
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import Writer
from megatron_opsd.methods.losses import divergence, policy_gradient
from megatron_opsd.methods.method import Method
from megatron_opsd.objective import TokenLoss
from megatron_opsd.rollout.engine import sample_seed
from megatron_opsd.types import Example, Grade, Group


class OPSD(Method):
    def __init__(self, config: Config, method: OpsdConfig, sampler: Sampler, writer: Writer) -> None:
        self._method, self._sampler, self._writer, self._prompts = method, sampler, writer, writer.prompts
        self._seed = config.train.seed
        self._problems = config.problems_per_step
        self.loss: TokenLoss = divergence(config) if method.loss == "divergence" else policy_gradient(config, "teacher")

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        return self._writer.answer(self._sampler.next_batch(self._problems), step, should_abort)

    def samples(self, groups: list[Group]) -> list[Sample]:
        samples = []
        for group, contexts in zip(groups, self._contexts(groups), strict=True):
            for rollout, grade, context in zip(group.rollouts, group.grades, contexts, strict=True):
                if grade in self._method.train_on and context is not None:
                    samples.append(Sample(group.prompt, context, rollout))
        return samples

    def _contexts(self, groups: list[Group]) -> list[list[list[int] | None]]:
        """The teacher's prompt for each response of each group; None where it is not to be learned from."""
        examples = [group.example for group in groups]
        match self._method.context:
            case "sibling":
                return [self._siblings(group, number) for number, group in enumerate(groups)]
            case "solution":
                prompts = [self._prompts.teacher(example) for example in examples]
            case "answer":
                prompts = [self._prompts.teacher_with_answer(example) for example in examples]
            case "shuffled":
                others = [*examples[1:], *examples[:1]]
                prompts = [
                    self._shown(example, other.solution) for example, other in zip(examples, others, strict=True)
                ]
            case "nothing":
                prompts = [group.prompt for group in groups]
        return [[prompt] * len(group.rollouts) for prompt, group in zip(prompts, groups, strict=True)]

    def _siblings(self, group: Group, number: int) -> list[list[int] | None]:
        """For each response another right one that reads otherwise, chosen by seed."""
        right = [x for x, grade in zip(group.rollouts, group.grades, strict=True) if grade == Grade.RIGHT]
        prompts = []
        for i, rollout in enumerate(group.rollouts):
            others = [other for other in right if other.token_ids != rollout.token_ids]
            if others:
                sample = number * len(group.rollouts) + i
                chosen = others[sample_seed(self._seed, rollout.weight_version + 1, sample) % len(others)]
                prompts.append(self._shown(group.example, self._prompts.read_response(chosen.token_ids)))
            else:
                skip = self._method.no_sibling == "skip"
                prompts.append(None if skip else self._prompts.teacher(group.example))
        return prompts

    def _shown(self, example: Example, solution: str) -> list[int]:
        return self._prompts.teacher(replace(example, solution=solution))
