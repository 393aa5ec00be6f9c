"""The objective over a vocabulary that is spread over ranks: one backend for each device, and three collectives."""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.objective import backend_torch
from megatron_opsd.objective.spec import Divergence
from megatron_opsd.objective.types import DivergenceOutput, LocalSums, Logits, Normalizers, SavedForBackward


@dataclass(frozen=True)
class VocabShard:
    """Rank r of the group holds ids r·v_local .. (r+1)·v_local - 1, of which the first ``width`` are real tokens."""

    group: dist.ProcessGroup | None
    rank: int
    start: int
    width: int

    @classmethod
    def of(cls, v_local: int, vocab_size: int, group: dist.ProcessGroup | None) -> "VocabShard":
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if not 0 < vocab_size <= v_local * size:
            raise ValueError(f"vocab_size {vocab_size} does not fit {size} shards of {v_local} logits")
        start = rank * v_local
        return cls(group if size > 1 else None, rank, start, min(max(vocab_size - start, 0), v_local))

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the group's ranks in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


def backend(logits: Logits) -> ModuleType:
    """The implementation for the logits' device: both modules offer the same three functions."""
    if not logits.student.is_cuda:
        return backend_torch
    from megatron_opsd.objective import backend_triton  # a machine without a GPU need not have Triton

    return backend_triton


def measure(
    logits: Logits, spec: Divergence, shard: VocabShard, vocab_size: int, token_ids: Tensor | None
) -> tuple[DivergenceOutput, SavedForBackward]:
    """Divergence and its companions per token, over the whole vocabulary: three all-reduces."""
    temperatures = (spec.temperature,) if token_ids is None or spec.temperature == 1 else (spec.temperature, 1.0)
    local: LocalSums = backend(logits).normalizer_sums(logits, temperatures)
    maxima = shard.all_reduce(local.maxima.clone(), dist.ReduceOp.MAX)  # first

    # A claim on the first place outweighs those of all higher ranks together, so the sum shows who comes first.
    claim = 4.0**-shard.rank
    holds = local.maxima == maxima
    behind = local.maxima - maxima
    sums = torch.cat([s * (behind / t).exp() for s, t in zip(local.sums, temperatures, strict=True)])
    # An all-reduce may add each row in its own order: only the difference is sure to be zero for identical models.
    difference = _rescaled_difference(local, behind / spec.temperature)[None]
    *reduced, difference, claims_student, claims_teacher = shard.all_reduce(
        torch.cat([sums, difference, claim * holds])
    )  # second
    student_sum, teacher_sum, *unit_sums = reduced
    normalizers = Normalizers(
        maxima, torch.stack([student_sum, teacher_sum]), _log_ratio(student_sum, teacher_sum, difference)
    )
    wins = holds & (torch.stack([claims_student, claims_teacher]) < 2 * claim)

    parts = [
        *backend(logits).entry_sums(logits, normalizers, spec),
        (wins.all(0) & (local.top_ids[0] == local.top_ids[1])).to(logits.dtype),
    ]
    if token_ids is not None:
        parts += _centered_logits(logits, maxima, token_ids - shard.start)
    sums = shard.all_reduce(torch.stack(parts))  # third
    sums[:4] += 0 * normalizers.sums.sum(0)  # a NaN logit spoils its token
    unclipped, loss, dlogp_sum, count, *log_means, agree = sums[:7]
    entropies = normalizers.sums.log() - torch.stack(log_means)

    logprobs = None, None
    if token_ids is not None:
        known = (token_ids >= 0) & (token_ids < vocab_size)
        unit = torch.stack(unit_sums) if unit_sums else normalizers.sums
        logprobs = torch.where(known, sums[7:] - unit.log(), torch.nan).unbind()
    capped = torch.zeros_like(unclipped, dtype=torch.bool)
    if spec.clip is not None and spec.clip_mode == "token":
        capped = unclipped > spec.clip
        loss, count = unclipped.clamp(max=spec.clip), capped.to(count.dtype)
    output = DivergenceOutput(loss, unclipped, count, entropies[0], entropies[1], agree, logprobs[0], logprobs[1])
    return output, SavedForBackward(normalizers, dlogp_sum, capped)


def write_gradient(logits: Logits, saved: SavedForBackward, weights: Tensor, spec: Divergence, out: Tensor) -> None:
    """The gradient of Σ weights · loss to the student's logits into ``out`` [n, width], which may be those logits.

    (w/τ)(g - p G). G should vanish where nothing is clipped; p G then cancels the error of the normalizers. A token of
    weight zero, or held constant by its clip, has gradient zero even if its divergence is infinite.
    """
    scale = torch.where(saved.capped, 0, weights.to(logits.dtype) / spec.temperature)
    backend(logits).write_gradient(logits, saved, scale, spec, out)


def _rescaled_difference(local: LocalSums, behind: Tensor) -> Tensor:
    """The difference of this rank's sums, [n], with each multiplied by exp(behind), [2, n], to its own precision."""
    student_scale, teacher_scale = behind.exp()
    apart = behind[1] - behind[0]  # NaN if both are -inf
    gap = torch.where(apart.abs() < 1, student_scale * torch.expm1(apart), teacher_scale - student_scale)
    return teacher_scale * local.difference + gap * local.sums[0, 0]


def _log_ratio(student_sum: Tensor, teacher_sum: Tensor, difference: Tensor) -> Tensor:
    """log(teacher_sum / student_sum), to the precision of their difference where they are close."""
    close = difference.abs() < student_sum / 2
    return torch.where(close, torch.log1p(difference / student_sum), torch.log(teacher_sum / student_sum))


def _centered_logits(logits: Logits, maxima: Tensor, columns: Tensor) -> Tensor:
    """The logits in ``columns`` [n] less the maxima, [2, n]; zero where another rank holds the column."""
    width = logits.student.shape[1]
    if width == 0:
        return torch.zeros_like(maxima)
    mine = (columns >= 0) & (columns < width)
    index = columns.clamp(0, width - 1)[:, None]
    picked = torch.stack([side.gather(1, index).squeeze(1).to(logits.dtype) for side in logits])
    return torch.where(mine, picked - maxima, 0)
