"""Which part of the vocabulary a rank holds, and the collectives over the ranks that hold the rest."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Rank r of the group holds ids r·v_local .. (r+1)·v_local - 1, of which the first ``width`` are real tokens."""

    group: dist.ProcessGroup | None
    start: int
    width: int

    @classmethod
    def of(cls, v_local: int, vocab_size: int, group: dist.ProcessGroup | None) -> "VocabShard":
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if not 0 < vocab_size <= v_local * size:
            raise ValueError(f"vocab_size {vocab_size} does not fit {size} shards of {v_local} logits")
        start = rank * v_local
        return cls(group if size > 1 else None, start, min(max(vocab_size - start, 0), v_local))

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the group's ranks in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def pick(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of ``ids`` [n], and whether this rank holds them; any number where it does not."""
        columns = ids - self.start
        held = (columns >= 0) & (columns < self.width)
        if self.width == 0:
            return torch.zeros_like(ids, dtype=logits.dtype), held
        return logits.gather(1, columns.clamp(0, self.width - 1)[:, None]).squeeze(1), held
