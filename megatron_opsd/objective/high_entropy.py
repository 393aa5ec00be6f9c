"""A loss of the tokens alone of which the student is least sure (arXiv 2506.01939, 2604.14084)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_opsd.objective.types import TokenLoss, Tokens
from megatron_opsd.objective.vocab_shard import VocabShard


@dataclass(frozen=True)
class HighEntropy:
    """``token_loss`` where the student's entropy, in nats at the loss's temperature, reaches ``threshold``; else 0."""

    token_loss: TokenLoss
    threshold: float

    @property
    def needs_teacher(self) -> bool:
        return self.token_loss.needs_teacher

    def keeps(self, entropy: Tensor) -> Tensor:
        """Which tokens are learned from. One with NaN is: the step must notice it."""
        return ~(entropy < self.threshold)

    def measure(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens, shard: VocabShard, vocab_size: int
    ) -> tuple[Any, Any]:
        values, saved = self.token_loss.measure(student, teacher, tokens, shard, vocab_size)
        kept = self.keeps(values.entropy_student)
        return values._replace(loss=torch.where(kept, values.loss, 0)), (saved, kept)

    def write_gradient(self, student: Tensor, teacher: Tensor | None, saved: Any, weights: Tensor, out: Tensor) -> None:
        inner, kept = saved
        self.token_loss.write_gradient(student, teacher, inner, torch.where(kept, weights, 0), out)
