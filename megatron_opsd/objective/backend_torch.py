"""The passes over the vocabulary in plain torch, for any device: what runs on a CPU, and what Triton is tested by.

A pass works on a tile of logits at a time, so that only a tile's temporaries exist.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_opsd.objective.clips import TokenLevel
from megatron_opsd.objective.types import DivergenceTerms, EntrySums, LocalSums, Logits, Normalizers, SavedForBackward

# A CPU keeps the dozen temporaries of a tile this large in its cache.
ENTRIES_AT_ONCE = 2**17
ENTRIES_AT_ONCE_ON_A_GPU = 2**24  # whose time goes into starting small kernels
# glibc gives freed memory back to the kernel, and a third of the time goes into getting it again, until a block of
# nearly 32 MiB has come and gone: then it keeps blocks of up to that size.
GLIBC_KEEPS_BYTES = 31 * 2**20


def normalizer_sums(logits: Logits, temperatures: tuple[float, ...]) -> LocalSums:
    """First pass: this rank's maxima, their columns, and sums of exponentials less its own maxima."""
    n, width = logits.student.shape
    if width == 0:
        nothing = logits.student.new_zeros((2, n), dtype=logits.dtype)
        return LocalSums(nothing - torch.inf, nothing.long(), nothing.expand(len(temperatures), 2, n), nothing[0])
    maxima, top_ids = (torch.stack(pair) for pair in zip(*map(_first_maximum, logits), strict=True))
    maxima = maxima.to(logits.dtype)
    # Finite, so that a shard of nothing but -inf has sums of zero.
    centers = maxima.clamp(min=torch.finfo(maxima.dtype).min)

    def sums(rows: slice, tile: Logits) -> list[Tensor]:
        centered = [side - centers[i, rows, None] for i, side in enumerate(tile)]
        *others, student, teacher = (
            torch.exp(side) if t == 1 else (side / t).exp_() for t in reversed(temperatures) for side in centered
        )
        return [s.sum(-1) for s in (student, teacher, *others)] + [teacher.sub_(student).sum(-1)]

    *totals, difference = _per_token(logits, sums)
    return LocalSums(maxima, top_ids, torch.stack(totals).view(len(temperatures), 2, n), difference)


def entry_sums(logits: Logits, normalizers: Normalizers, loss: DivergenceTerms) -> EntrySums:
    """Second pass: this rank's sums over entries."""
    clip = loss.clipping

    def sums(rows: slice, tile: Logits) -> list[Tensor]:
        p, q, d, *centered = _probabilities(tile, normalizers, rows, loss.temperature)
        # Minus infinity times a probability of zero counts as zero.
        lowest = torch.finfo(p.dtype).min
        means = [
            side.clamp_(min=lowest).mul_(probability).sum(-1)
            for side, probability in zip(centered, (p, q), strict=True)
        ]
        forms = loss.entry.forms(p, q, d)
        assert forms.value is not None
        unclipped = forms.value.sum(-1)
        if isinstance(clip, TokenLevel):
            return [unclipped, unclipped, forms.dlogp.sum(-1), torch.zeros_like(unclipped), *means]
        return [unclipped, *(part.sum(-1) for part in clip.entries(forms)), *means]

    return EntrySums(*_per_token(logits, sums))


def write_gradient(logits: Logits, saved: SavedForBackward, scale: Tensor, loss: DivergenceTerms, out: Tensor) -> None:
    """Third pass: scale (g - p G) into ``out`` [n, width], which may be the student's logits; 0 where scale [n] is."""
    clip = loss.clipping
    needs_raw, needs_value = (False, False) if isinstance(clip, TokenLevel) else clip.dlogp_needs
    dead = scale == 0
    any_dead = not dead.is_cpu or bool(dead.any())  # asking a GPU would wait for it
    for rows, columns, tile in _tiles(logits):
        p, q, d, *_ = _probabilities(tile, saved.normalizers, rows, loss.temperature)
        forms = loss.entry.forms(p, q, d, needs_raw, needs_value)
        dlogp = forms.dlogp if isinstance(clip, TokenLevel) else clip.dlogp(forms)
        gradient = torch.addcmul(dlogp, p, saved.dlogp_sum[rows, None], value=-1)
        torch.mul(gradient, scale[rows, None], out=out[rows, columns])
        if any_dead:
            out[rows, columns].masked_fill_(dead[rows, None], 0)


def _tiles(logits: Logits) -> Iterator[tuple[slice, slice, Logits]]:
    """Rows, columns and logits of one tile after the other, in the dtype to compute in; all of a row come together."""
    at_once = ENTRIES_AT_ONCE if logits.student.is_cpu else ENTRIES_AT_ONCE_ON_A_GPU
    torch.empty(GLIBC_KEEPS_BYTES, dtype=torch.uint8, device="cpu")
    n, width = logits.student.shape
    parts = max(1, -(-width // at_once))
    step = max(1, at_once // max(1, width))
    for start in range(0, max(1, n), step):  # of no rows, one empty tile
        rows = slice(start, start + step)
        for part in range(parts):
            columns = slice(width * part // parts, width * (part + 1) // parts)
            yield rows, columns, Logits(*(side[rows, columns].to(logits.dtype) for side in logits))


def _per_token(logits: Logits, function: Callable[[slice, Logits], list[Tensor]]) -> Tensor:
    """Σ over the tiles of each row of what ``function`` returns for rows and tile, stacked to [values, n]."""
    sums: dict[int, Tensor] = {}
    for rows, _, tile in _tiles(logits):
        values = torch.stack(function(rows, tile))
        sums[rows.start] = sums[rows.start] + values if rows.start in sums else values
    return torch.cat(list(sums.values()), dim=1)


def _first_maximum(side: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and its first place. Only the block that holds it is searched: a search costs ten maxima."""
    width = side.shape[1]
    block = min(width, 1024)
    whole = width - width % block
    maxima = side[:, :whole].unflatten(1, (-1, block)).amax(-1)  # [n, blocks]
    if whole < width:
        maxima = torch.cat([maxima, side[:, whole:].amax(-1, keepdim=True)], dim=1)
    maximum, holder = maxima.max(-1)
    columns = (holder[:, None] * block + torch.arange(block, device=side.device)).clamp_(max=width - 1)
    return maximum, columns.gather(1, side.gather(1, columns).argmax(-1, keepdim=True)).squeeze(1)


def _probabilities(tile: Logits, normalizers: Normalizers, rows: slice, temperature: float) -> tuple[Tensor, ...]:
    """p, q, d = log q - log p, and both centered logits over temperature, of a tile.

    d comes from the logits' difference, which is exact for close ones; it is 0 where both probabilities are.
    """
    maxima, sums = normalizers.maxima[:, rows, None], normalizers.sums[:, rows, None]
    d = tile.teacher - tile.student
    d.sub_(maxima[1] - maxima[0])
    centered = [side - maxima[i] for i, side in enumerate(tile)]
    if temperature != 1:
        d.div_(temperature)
        centered = [side.div_(temperature) for side in centered]
    d.sub_(normalizers.log_ratio[rows, None]).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    p, q = (torch.exp(side).div_(sums[i]) for i, side in enumerate(centered))
    return p, q, d, *centered
