"""The student's answers to problems, graded: where every on-policy method begins."""

from collections.abc import Callable, Sequence

from megatron_opsd.config import Config
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.evaluate import grade
from megatron_opsd.rollout.engine import Engine, Sampling, sample_seed
from megatron_opsd.types import Example, Grade, Group, Rollout


def answer(
    examples: Sequence[Example],
    step: int,
    engine: Engine,
    prompts: PromptBuilder,
    config: Config,
    should_abort: Callable[[], bool],
) -> list[Group]:
    """``rollout.samples_per_prompt`` answers to each problem, from the weights of ``step``. Collective.

    Raises:
        StepAbortedError: ``should_abort`` was true on a rank.
    """
    settings, k = config.rollout, config.rollout.samples_per_prompt
    asked = [prompts.student(example) for example in examples]
    sampling = Sampling(settings.max_response_tokens, settings.temperature, settings.top_p, settings.top_k)
    seeds = [sample_seed(config.train.seed, step + 1, i) for i in range(k * len(examples))]
    rollouts = engine.generate([prompt for prompt in asked for _ in range(k)], sampling, seeds, should_abort)
    assert all(rollout.weight_version == step for rollout in rollouts), "stale weights"
    repeated = [example for example in examples for _ in range(k)]
    correct = grade(rollouts, repeated, prompts.tokenizer, config.evaluate.answer_check)
    grades = [_grade(*of_one) for of_one in zip(repeated, rollouts, correct, strict=True)]
    return [
        Group(example, prompt, rollouts[i * k : (i + 1) * k], grades[i * k : (i + 1) * k])
        for i, (example, prompt) in enumerate(zip(examples, asked, strict=True))
    ]


def _grade(example: Example, rollout: Rollout, correct: bool) -> Grade:
    if example.answer is None:
        return Grade.UNKNOWN
    if correct:
        return Grade.RIGHT
    return Grade.UNFINISHED if rollout.finish_reason == "length" else Grade.WRONG
