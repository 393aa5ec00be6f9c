"""Responses with their grades, of the student or from the data: where every method begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_opsd.config import Config
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.evaluate import grade
from megatron_opsd.rollout.engine import Engine, Sampling, sample_seed
from megatron_opsd.types import Example, Grade, Group, Rollout


@dataclass(frozen=True)
class Writer:
    """Lets the engine answer problems, and grades what it writes. Collective."""

    config: Config
    prompts: PromptBuilder
    engine: Engine

    def answer(self, examples: Sequence[Example], step: int, should_abort: Callable[[], bool]) -> list[Group]:
        """``rollout.samples_per_prompt`` answers to each problem, from the weights of ``step``.

        Raises:
            StepAbortedError: ``should_abort`` was true on a rank.
        """
        k, seed = self.config.rollout.samples_per_prompt, self.config.train.seed
        asked = [self.prompts.student(example) for example in examples]
        seeds = [sample_seed(seed, step + 1, i) for i in range(k * len(examples))]
        repeated = [example for example in examples for _ in range(k)]
        rollouts, grades = self.write(repeated, [prompt for prompt in asked for _ in range(k)], seeds, should_abort)
        assert all(rollout.weight_version == step for rollout in rollouts), "stale weights"
        return [
            Group(example, prompt, rollouts[i * k : (i + 1) * k], grades[i * k : (i + 1) * k])
            for i, (example, prompt) in enumerate(zip(examples, asked, strict=True))
        ]

    def write(
        self,
        examples: Sequence[Example],
        asked: Sequence[list[int]],
        seeds: Sequence[int],
        should_abort: Callable[[], bool],
    ) -> tuple[list[Rollout], list[Grade]]:
        """One response to each prompt, and its grade. Raises StepAbortedError as ``answer`` does."""
        settings = self.config.rollout
        sampling = Sampling(settings.max_response_tokens, settings.temperature, settings.top_p, settings.top_k)
        rollouts = self.engine.generate(asked, sampling, seeds, should_abort)
        correct = grade(rollouts, examples, self.prompts.tokenizer, self.config.evaluate.answer_check)
        return rollouts, [_grade(*of_one) for of_one in zip(examples, rollouts, correct, strict=True)]


def _grade(example: Example, rollout: Rollout, correct: bool) -> Grade:
    if example.answer is None:
        return Grade.UNKNOWN
    if rollout.finish_reason == "length":
        return Grade.UNFINISHED
    return Grade.RIGHT if correct else Grade.WRONG


def solutions(examples: Sequence[Example], prompts: PromptBuilder, step: int) -> list[Group]:
    """The data's solutions as responses, the end of the turn included."""
    return [
        Group(
            example,
            prompts.student(example),
            [Rollout(prompts.solution(example), [], "stop", step)],
            [Grade.UNKNOWN],
            solution_in_sight=True,
        )
        for example in examples
    ]
