"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), with outcome rewards.

The student answers each problem k times; a right answer has reward 1, any other one 0, an unfinished one too. All
tokens of an answer share its advantage, A = (r - mean) / (std + 1e-4) over the group, std with k - 1. Without the
division, and with ``objective.normalization = "constant"``, it is Dr. GRPO (arXiv 2503.20783); with ``"token"`` and
groups without signal dropped it has DAPO's divisor (arXiv 2503.14476), but no other problems are drawn in their place.

Departures: one update a batch, so that the ratio to the policy that wrote is 1 and its clip has no effect; no KL to a
reference policy (the baseline of arXiv 2601.18734 has none either); no reward for the format. It cannot learn from a
problem that the student always or never solves: such a group has no gradient.
"""

from collections.abc import Callable
from statistics import mean, stdev

from megatron_opsd.config import Config, GrpoConfig
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import Writer
from megatron_opsd.methods.losses import policy_gradient
from megatron_opsd.methods.method import Method
from megatron_opsd.objective import TokenLoss
from megatron_opsd.types import Grade, Group

EPSILON = 1e-4


class GRPO(Method):
    def __init__(self, config: Config, method: GrpoConfig, sampler: Sampler, writer: Writer) -> None:
        self._method, self._sampler, self._writer = method, sampler, writer
        self._problems = config.problems_per_step
        self.loss: TokenLoss = policy_gradient(config, "given")

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        return self._writer.answer(self._sampler.next_batch(self._problems), step, should_abort)

    def samples(self, groups: list[Group]) -> list[Sample]:
        return [
            Sample(group.prompt, None, rollout, advantage)
            for group in groups
            if group.has_signal or not self._method.drop_groups_without_signal
            for rollout, advantage in zip(group.rollouts, self._advantages(group), strict=True)
        ]

    def _advantages(self, group: Group) -> list[float]:
        rewards = [float(grade == Grade.RIGHT) for grade in group.grades]
        scale = stdev(rewards) + EPSILON if self._method.scale_by_std else 1.0
        return [(reward - mean(rewards)) / scale for reward in rewards]
