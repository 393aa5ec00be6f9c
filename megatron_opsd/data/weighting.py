"""How much each token of a response counts in the loss, and what the sum is divided by."""

from dataclasses import dataclass
from typing import Literal

from megatron_opsd.types import Rollout


@dataclass(frozen=True)
class Weighting:
    """Weights and the divisor make (Σ over all ranks of weight · loss) / (Σ of counts) the wanted mean.

    normalization         ``token``: over all tokens that are trained on. ``sequence``: of the sequences' means.
                          ``constant``: of the sequences' sums over ``longest`` (Dr. GRPO, arXiv 2503.20783).
    longest               tokens of the longest response that the limits allow.
    position              ``rising`` and ``falling`` weigh the j-th of m tokens by (2j + 1)/m and (2(m - j) - 1)/m.
                          Their mean is 1, so the divisor stays the same.
    skip                  tokens at the start that are not trained on.
    train_on_end_of_turn  False: the token that ends a response has weight 0, and counts nowhere.
    """

    normalization: Literal["token", "sequence", "constant"] = "token"
    longest: int = 1
    position: Literal["even", "rising", "falling"] = "even"
    skip: int = 0
    train_on_end_of_turn: bool = True

    def measured(self, rollout: Rollout) -> int:
        """Number of tokens, from the end, whose loss is computed."""
        return max(0, len(rollout.token_ids) - self.skip)

    def trained(self, rollout: Rollout) -> int:
        """How many of them count."""
        measured = self.measured(rollout)
        leaves_out_end = measured > 0 and rollout.finish_reason == "stop" and not self.train_on_end_of_turn
        return measured - leaves_out_end

    def weights(self, rollout: Rollout) -> list[float]:
        """Of each measured token."""
        m = self.trained(rollout)
        match self.position:
            case "even":
                weights = [1.0] * m
            case "rising":
                weights = [(2 * j + 1) / m for j in range(m)]
            case "falling":
                weights = [(2 * (m - j) - 1) / m for j in range(m)]
        scale = {"token": 1, "sequence": m, "constant": self.longest}[self.normalization]
        return [weight / scale for weight in weights] + [0.0] * (self.measured(rollout) - m)

    def count(self, rollout: Rollout) -> int:
        """The response's share of the divisor."""
        m = self.trained(rollout)
        return {"token": m, "sequence": int(m > 0), "constant": 1}[self.normalization]
