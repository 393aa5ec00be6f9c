"""On-Policy Self-Distillation (arXiv 2601.18734).

The student answers, and at each token of its answer the teacher, who also sees the reference solution, says what should
have come next. Departures from the paper: all parameters learn (there: LoRA), and the default clip is ``saturate``
(docs/evidence.md says why).
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_opsd.config import Config, OpsdConfig
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import answer
from megatron_opsd.objective import Divergence, SampledToken, TokenLoss
from megatron_opsd.rollout.engine import Engine
from megatron_opsd.types import Group


class OPSD:
    def __init__(
        self, config: Config, method: OpsdConfig, prompts: PromptBuilder, sampler: Sampler, engine: Engine
    ) -> None:
        self._config, self._method, self._prompts = config, method, prompts
        self._sampler, self._engine = sampler, engine
        self._problems = config.train.global_batch_size // config.rollout.samples_per_prompt
        self.loss: TokenLoss = opsd_loss(config)

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        examples = self._sampler.next_batch(self._problems)
        return answer(examples, step, self._engine, self._prompts, self._config, should_abort)

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [
            Sample(group.prompt, teacher_prompt, rollout)
            for group, teacher_prompt in zip(groups, self._teacher_prompts(groups), strict=True)
            for rollout, grade in zip(group.rollouts, group.grades, strict=True)
            if grade in self._method.train_on
        ]

    def _teacher_prompts(self, groups: list[Group]) -> list[list[int]]:
        examples = [group.example for group in groups]
        match self._method.context:
            case "solution":
                return [self._prompts.teacher(example) for example in examples]
            case "answer":
                return [self._prompts.teacher_with_answer(example) for example in examples]
            case "shuffled":
                others = [*examples[1:], *examples[:1]]
                mixed = [replace(x, solution=other.solution) for x, other in zip(examples, others, strict=True)]
                return [self._prompts.teacher(example) for example in mixed]
            case "nothing":
                return [group.prompt for group in groups]


def opsd_loss(config: Config) -> TokenLoss:
    """The loss as ``method.loss`` and [objective] describe it."""
    settings = config.objective
    if isinstance(config.method, OpsdConfig) and config.method.loss == "sampled_token":
        return SampledToken(settings.temperature, "teacher", settings.importance_cap)
    if settings.clip_mode == "none":
        return Divergence(settings.kind, settings.beta, settings.temperature)
    return Divergence(settings.kind, settings.beta, settings.temperature, settings.clip, settings.clip_mode)
