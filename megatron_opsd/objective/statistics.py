"""Per-token sums over a vocabulary that is spread over ranks, in three collectives, and the gradient made from them.

Only [n]-sized statistics outlive a pass: probabilities are made again from the logits, some tokens at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.objective.entries import clip_slope, clip_value, entry_forms
from megatron_opsd.objective.spec import Divergence

# Logits handled at once. On a CPU the dozen temporaries of a tile should stay in its cache; elsewhere a launch costs
# more than that, and a float32 temporary takes 32 MiB.
ENTRIES_AT_ONCE = {"cpu": 2**17}
ENTRIES_AT_ONCE_ELSEWHERE = 2**23


class DivergenceOutput(NamedTuple):
    """Per token, [n], float32 (float64 from float64 logits). Only ``loss`` may carry a gradient."""

    loss: Tensor  # nats, after the clip
    unclipped: Tensor  # nats, >= 0
    clip_count: Tensor  # entries above the clip (`entry`: f > c, `saturate`: f⁺ > c); `token`: 1 if the token is
    entropy_student: Tensor  # nats, at spec.temperature, like the next
    entropy_teacher: Tensor
    agree: Tensor  # 1 where both put the same token first (of equals, the lowest id), else 0
    student_logprobs: Tensor | None = None  # of token_ids at temperature 1, as vLLM reports them, like the next
    teacher_logprobs: Tensor | None = None  # NaN for an id outside the vocabulary


class Logits(NamedTuple):
    """Both sides' logits for this rank's real tokens: [n, width] each, padding cut off."""

    student: Tensor
    teacher: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in."""
        return torch.promote_types(torch.float32, torch.promote_types(self.student.dtype, self.teacher.dtype))

    def tile(self, rows: slice, columns: slice) -> "Logits":
        """Some tokens' logits for some of the vocabulary, in the dtype to compute in."""
        return Logits(self.student[rows, columns].to(self.dtype), self.teacher[rows, columns].to(self.dtype))

    def tiles(self) -> Iterator[tuple[slice, list[slice]]]:
        """Rows to handle together, and the columns to take them in; one empty slice if there are none."""
        n, width = self.student.shape
        at_once = ENTRIES_AT_ONCE.get(self.student.device.type, ENTRIES_AT_ONCE_ELSEWHERE)
        parts = max(1, -(-width // at_once))
        columns = [slice(width * i // parts, width * (i + 1) // parts) for i in range(parts)]
        step = max(1, at_once // max(1, width))
        return ((slice(start, start + step), columns) for start in range(0, max(1, n), step))

    def per_token(self, function: Callable[[slice, slice], list[Tensor]]) -> Tensor:
        """Σ over the tiles of each row of what ``function`` returns, stacked to [values, n]."""
        sums = []
        for rows, columns in self.tiles():
            first, *rest = (torch.stack(function(rows, part)) for part in columns)
            sums.append(sum(rest, first))
        return torch.cat(sums, dim=1)


class Normalizers(NamedTuple):
    """What turns logits into probabilities, over the whole vocabulary."""

    maxima: Tensor  # [2, n] student, teacher; of the logits themselves
    sums: Tensor  # [2, n] Σ exp((logit - maximum) / temperature)
    log_ratio: Tensor  # [n] log(teacher's sum / student's sum)


class Statistics(NamedTuple):
    """What the gradient needs besides the logits."""

    normalizers: Normalizers
    slope_sum: Tensor  # [n] G = Σ g over the whole vocabulary
    capped: Tensor  # [n] tokens whose loss a `token` clip holds constant


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


def measure(
    logits: Logits, spec: Divergence, shard: VocabShard, vocab_size: int, token_ids: Tensor | None
) -> tuple[DivergenceOutput, Statistics]:
    """Divergence and its companions per token, over the whole vocabulary: three all-reduces."""
    local_maxima, top_ids = _maxima(logits)
    maxima = shard.all_reduce(local_maxima.clone(), dist.ReduceOp.MAX)  # first

    # A claim on the first place outweighs those of all higher ranks together, so the sum shows who comes first.
    claim = 4.0**-shard.rank
    holds = local_maxima == maxima
    needs_unit = token_ids is not None and spec.temperature != 1
    sums = _sum_exps(logits, maxima, [spec.temperature, 1.0] if needs_unit else [spec.temperature])
    reduced = shard.all_reduce(torch.cat([sums, claim * holds]))  # second
    normalizers = Normalizers(maxima, reduced[:2], _log_ratio(*reduced[:3]))
    wins = holds & (reduced[-2:] < 2 * claim)

    parts = [_entry_sums(logits, normalizers, spec), (wins.all(0) & (top_ids[0] == top_ids[1]))[None].to(logits.dtype)]
    if token_ids is not None:
        parts.append(_centered_logits(logits, maxima, token_ids - shard.start))
    sums = shard.all_reduce(torch.cat(parts))  # third
    sums[:4] += 0 * normalizers.sums.sum(0)  # a NaN logit spoils its token
    unclipped, loss, slope_sum, count, *rest = sums.unbind()

    if token_ids is not None:
        known = (token_ids >= 0) & (token_ids < vocab_size)
        unit_sums = reduced[3:5] if needs_unit else reduced[:2]
        rest[-2:] = torch.where(known, torch.stack(rest[-2:]) - unit_sums.log(), torch.nan).unbind()
    capped = torch.zeros_like(unclipped, dtype=torch.bool)
    if spec.clip is not None and spec.clip_mode == "token":
        capped = unclipped > spec.clip
        loss, count = unclipped.clamp(max=spec.clip), capped.to(count.dtype)
    return DivergenceOutput(loss, unclipped, count, *rest), Statistics(normalizers, slope_sum, capped)


def logits_gradient(
    logits: Logits, statistics: Statistics, weights: Tensor, spec: Divergence
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The gradient of Σ weights · loss to the student's logits, [rows, columns], tile by tile.

    Each tile's logits may be overwritten with it: none is read again.

    (w/τ)(g - p G). G should vanish where nothing is clipped; p G then cancels the error of the normalizers. A token of
    weight zero, or held constant by its clip, has gradient zero even if its divergence is infinite.
    """
    scale = weights.to(logits.dtype) / spec.temperature
    scale = torch.where(statistics.capped, 0, scale)
    dead = scale == 0
    any_dead = not dead.is_cpu or bool(dead.any())  # asking a GPU would wait for it
    normalizers = statistics.normalizers
    needs_value = spec.clip is not None and spec.clip_mode == "saturate"

    def of_tile(rows: slice, columns: slice) -> Tensor:
        p, q, d, *_ = _probabilities(logits.tile(rows, columns), normalizers, rows, spec.temperature)
        slope = clip_slope(entry_forms(p, q, d, spec, with_value=needs_value), spec)
        gradient = torch.addcmul(slope, p, statistics.slope_sum[rows, None], value=-1).mul_(scale[rows, None])
        return gradient.masked_fill_(dead[rows, None], 0) if any_dead else gradient

    for rows, columns in logits.tiles():
        for part in columns:
            yield rows, part, of_tile(rows, part)


def _maxima(logits: Logits) -> tuple[Tensor, Tensor]:
    """This rank's largest logits, [2, n], and their places, [2, n]; -inf where it holds padding only."""
    n, width = logits.student.shape
    if width == 0:
        empty = logits.student.new_full((2, n), -torch.inf, dtype=logits.dtype)
        return empty, torch.zeros_like(empty, dtype=torch.long)
    (student, student_ids), (teacher, teacher_ids) = (side.max(dim=-1) for side in logits)
    return torch.stack([student.to(logits.dtype), teacher.to(logits.dtype)]), torch.stack([student_ids, teacher_ids])


def _sum_exps(logits: Logits, maxima: Tensor, temperatures: list[float]) -> Tensor:
    """This rank's Σ exp((logit - maximum) / temperature): [3, n] student, teacher, difference; [2, n] for a second."""

    def sums(rows: slice, columns: slice) -> list[Tensor]:
        centered = [side - maxima[i, rows, None] for i, side in enumerate(logits.tile(rows, columns))]
        student, teacher = (_exp(side, temperatures[0]) for side in centered)
        # Reductions may add each row in its own order: only the difference is sure to be zero for identical models.
        values = [student.sum(-1), teacher.sum(-1), teacher.sub_(student).sum(-1)]
        return values + [_exp(side, t).sum(-1) for t in temperatures[1:] for side in centered]

    return logits.per_token(sums)


def _exp(x: Tensor, temperature: float) -> Tensor:
    return torch.exp(x) if temperature == 1 else (x / temperature).exp_()


def _log_ratio(student_sum: Tensor, teacher_sum: Tensor, difference: Tensor) -> Tensor:
    """log(teacher_sum / student_sum), to the precision of their difference where they are close."""
    close = difference.abs() < student_sum / 2
    return torch.where(close, torch.log1p(difference / student_sum), torch.log(teacher_sum / student_sum))


def _probabilities(logits: Logits, normalizers: Normalizers, rows: slice, temperature: float) -> tuple[Tensor, ...]:
    """p, q, d = log q - log p, and both centered logits over temperature, of a tile.

    d comes from the logits' difference, which is exact for close ones; it is 0 where both probabilities are.
    """
    maxima, sums = normalizers.maxima[:, rows, None], normalizers.sums[:, rows, None]
    d = logits.teacher - logits.student
    d.sub_(maxima[1] - maxima[0])
    centered = [side - maxima[i] for i, side in enumerate(logits)]
    if temperature != 1:
        d.div_(temperature)
        centered = [side.div_(temperature) for side in centered]
    d.sub_(normalizers.log_ratio[rows, None]).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    p, q = (torch.exp(side).div_(sums[i]) for i, side in enumerate(centered))
    return p, q, d, *centered


def _entry_sums(logits: Logits, normalizers: Normalizers, spec: Divergence) -> Tensor:
    """This rank's Σ over entries, [6, n]: f⁺, the clipped f⁺, g, entries above the clip, both entropies."""
    log_sums = normalizers.sums.log()
    by_entry = spec.clip is not None and spec.clip_mode != "token"

    def sums(rows: slice, columns: slice) -> list[Tensor]:
        tile = logits.tile(rows, columns)
        p, q, d, *centered = _probabilities(tile, normalizers, rows, spec.temperature)
        # Minus infinity times a probability of zero counts as zero.
        lowest = torch.finfo(p.dtype).min
        entropies = [
            side.sub_(log_sums[i, rows, None]).clamp_(min=lowest).mul_(probability).sum(-1).neg_()
            for i, (side, probability) in enumerate(zip(centered, (p, q), strict=True))
        ]
        forms = entry_forms(p, q, d, spec)
        assert forms.value is not None
        unclipped = forms.value.sum(-1)
        loss, count = unclipped, torch.zeros_like(unclipped)
        if by_entry:
            value, above = clip_value(forms, spec)
            loss, count = value.sum(-1), above.sum(-1, dtype=value.dtype)
        return [unclipped, loss, clip_slope(forms, spec).sum(-1), count, *entropies]

    return logits.per_token(sums)


def _centered_logits(logits: Logits, maxima: Tensor, columns: Tensor) -> Tensor:
    """The logits in ``columns`` [n] less the maxima, [2, n]; zero where another rank holds the column."""
    width = logits.student.shape[1]
    if width == 0:
        return torch.zeros_like(maxima)
    mine = (columns >= 0) & (columns < width)
    index = columns.clamp(0, width - 1)[:, None]
    picked = torch.stack([side.gather(1, index).squeeze(1).to(logits.dtype) for side in logits])
    return torch.where(mine, picked - maxima, 0)
