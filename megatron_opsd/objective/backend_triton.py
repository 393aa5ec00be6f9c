# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
"""The passes over the vocabulary as Triton kernels: what backend_torch computes, in one pass over both sides each.

One program per token walks along its row in tiles, so a GPU is busy from some hundred tokens on. Reading an entry takes
as long as about forty instructions. Hence settings and polynomials are constants of the kernels, a probability costs
one exponential, a maximum moves the sums only where it rises, only the last tile is masked, and a thread's entries are
summed before they meet another's.

A GPU's 2^x is good to two units in the last place. Nothing here subtracts close exponentials to make a small number, or
takes the logarithm of a number near 1: below |d| = SERIES_BELOW all that is small comes from a polynomial in d.
Selection is cheap here, so ``tl.where`` joins the ranges; a NaN in the one not taken does no harm.
"""

from functools import cache
from math import cos, log, pi
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_opsd.objective.kinds import FARTHEST, jsd_coefficients, kl_coefficients
from megatron_opsd.objective.types import DivergenceTerms, EntrySums, LocalSums, Logits, Normalizers, SavedForBackward

KINDS = ("forward_kl", "reverse_kl", "jsd")  # that the kernels know

# A tile is LANES lines of 8 entries of each side (8 of bf16 are one 16-byte load), two lines a thread.
LANES = 256
WARPS = 4
# Higher than entries.SERIES_BELOW: the less exact the exponential, the further out the formulas cancel.
SERIES_BELOW = tl.constexpr(0.5)
FAR = tl.constexpr(FARTHEST)
LOG_2 = tl.constexpr(log(2))
LOG_2_E = tl.constexpr(1 / log(2))


def normalizer_sums(logits: Logits, temperatures: tuple[float, ...]) -> LocalSums:
    """First pass: this rank's maxima, their columns, and sums of exponentials less its own maxima."""
    n = len(logits.student)
    values = torch.empty(3 + 2 * len(temperatures), n, dtype=logits.dtype, device=logits.student.device)
    top_ids = torch.empty(2, n, dtype=torch.long, device=values.device)
    first, *second = temperatures
    _launch(
        _normalizer_kernel, logits, values, top_ids, n,
        TERMS=12 if logits.dtype is torch.float32 else 20,
        TEMPERATURE=first, SECOND_TEMPERATURE=second[0] if second else None,
    )  # fmt: skip
    maxima, sums, difference, second_sums = values[:2], values[2:4], values[4], values[5:]
    return LocalSums(maxima, top_ids, torch.stack([sums, second_sums] if second else [sums]), difference)


def entry_sums(logits: Logits, normalizers: Normalizers, loss: DivergenceTerms) -> EntrySums:
    """Second pass: this rank's sums over entries."""
    n = len(logits.student)
    sums = torch.empty(6, n, dtype=logits.dtype, device=logits.student.device)
    _launch(_entry_kernel, logits, *_per_row(normalizers), sums, n, **_constants(loss, logits.dtype))
    return EntrySums(*sums)


def write_gradient(logits: Logits, saved: SavedForBackward, scale: Tensor, loss: DivergenceTerms, out: Tensor) -> None:
    """Third pass: scale (g - p G) into ``out`` [n, width], which may be the student's logits; 0 where scale [n] is."""
    per_row = *_per_row(saved.normalizers), saved.dlogp_sum.contiguous(), scale.contiguous()
    n = len(logits.student)
    _launch(_gradient_kernel, logits, *per_row, out, *out.stride(), n, **_constants(loss, logits.dtype))


def _launch(kernel: Any, logits: Logits, *arguments: Any, **constants: Any) -> None:
    n, width = logits.student.shape
    sides = [argument for side in logits for argument in (side, *side.stride())]
    constants["DTYPE"] = tl.float64 if logits.dtype is torch.float64 else tl.float32
    constants["LOWEST"] = torch.finfo(logits.dtype).min
    if n > 0:
        with torch.cuda.device_of(logits.student):
            kernel[(n,)](*sides, width, *arguments, **constants, LANES=LANES, num_warps=WARPS, enable_fp_fusion=True)


def _per_row(normalizers: Normalizers) -> list[Tensor]:
    """What every row of a kernel loads first: maxima, reciprocals of the sums, log-ratio."""
    maxima, sums, log_ratio = normalizers
    return [maxima.contiguous(), sums.reciprocal().contiguous(), log_ratio.contiguous()]


def _constants(loss: DivergenceTerms, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels know of ``loss``, and their polynomials, when they are compiled."""
    precise = dtype is torch.float64
    by_entry = loss.clip is not None and loss.clip_mode != "token"
    series = jsd_coefficients(loss.beta, 40) if loss.kind == "jsd" else None
    return {
        "KIND": loss.kind,
        "BETA": loss.beta,
        "TEMPERATURE": loss.temperature,
        "CLIP": loss.clip,
        "CLIP_MODE": loss.clip_mode if by_entry else "none",
        "KL": _polynomial(kl_coefficients(20), SERIES_BELOW.value, 12 if precise else 6),
        "JSD": series and _polynomial(series, SERIES_BELOW.value, 14 if precise else 7),
        "LOG1P": _polynomial(tuple((-1) ** (k + 1) / k for k in range(2, 60)), 1 / 3, 9),
    }


@cache
def _polynomial(series: tuple[float, ...], below: float, terms: int) -> tuple[float, ...]:
    """The coefficients of the polynomial that meets a power series at the Chebyshev points of [-below, below]."""
    points = [below * cos(pi * (k + 0.5) / terms) for k in range(terms)]
    powers, values = (
        torch.tensor([[x**k for k in range(count)] for x in points], dtype=torch.float64)
        for count in (terms, len(series))
    )
    return tuple(torch.linalg.solve(powers, values @ torch.tensor(series, dtype=torch.float64)).tolist())


@triton.jit
def _normalizer_kernel(
    student, student_row, student_column, teacher, teacher_row, teacher_column, width, values, top_ids, n,
    TERMS: tl.constexpr, TEMPERATURE: tl.constexpr, SECOND_TEMPERATURE: tl.constexpr,
    DTYPE: tl.constexpr, LOWEST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of one row maxima, sums, their difference and sums at the second temperature into values, maxima's columns."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    top_s = tl.full((), -float("inf"), DTYPE)
    top_t = tl.full((), -float("inf"), DTYPE)
    at_s = tl.full((), 0, tl.int32)
    at_t = tl.full((), 0, tl.int32)
    sum_s = tl.zeros((LANES,), DTYPE)
    sum_t = tl.zeros((LANES,), DTYPE)
    second_s = tl.zeros((LANES,), DTYPE)
    second_t = tl.zeros((LANES,), DTYPE)
    difference = tl.zeros((LANES,), DTYPE)
    for start in range(0, width, LANES * 8):
        z_s = _load(student, start, width, student_column, DTYPE, LANES)
        z_t = _load(teacher, start, width, teacher_column, DTYPE, LANES)
        top_s, at_s, behind_s = _raise(z_s, top_s, at_s, start, LOWEST, LANES)
        top_t, at_t, behind_t = _raise(z_t, top_t, at_t, start, LOWEST, LANES)
        if (behind_s < 0) | (behind_t < 0):  # in few tiles: in random order, about log(tiles)
            scale_s = _exp(behind_s, TEMPERATURE)
            scale_t = _exp(behind_t, TEMPERATURE)
            # As in divergence._rescaled_difference: the sums' difference keeps its own precision.
            apart = (behind_t - behind_s) * (1 / TEMPERATURE)
            gap = tl.where(tl.abs(apart) < 1, scale_s * _expm1(apart, TERMS), scale_t - scale_s)
            difference = difference * scale_t + sum_s * gap
            sum_s *= scale_s
            sum_t *= scale_t
            if SECOND_TEMPERATURE is not None:
                second_s *= _exp(behind_s, SECOND_TEMPERATURE)
                second_t *= _exp(behind_t, SECOND_TEMPERATURE)
        z_s -= tl.maximum(top_s, LOWEST)  # finite, so that a row of nothing but -inf has sums of zero
        z_t -= tl.maximum(top_t, LOWEST)
        exp_s, exp_t = _exp(z_s, TEMPERATURE), _exp(z_t, TEMPERATURE)
        sum_s += tl.sum(exp_s, 1)
        sum_t += tl.sum(exp_t, 1)
        difference += tl.sum(exp_t - exp_s, 1)
        if SECOND_TEMPERATURE is not None:
            second_s += tl.sum(_exp(z_s, SECOND_TEMPERATURE), 1)
            second_t += tl.sum(_exp(z_t, SECOND_TEMPERATURE), 1)
    _store_pair(top_ids + row, at_s, at_t, n)
    _store_pair(values + row, top_s, top_t, n)
    _store_pair(values + 2 * n + row, tl.sum(sum_s, 0), tl.sum(sum_t, 0), n)
    tl.store(values + 4 * n + row, tl.sum(difference, 0))
    if SECOND_TEMPERATURE is not None:
        _store_pair(values + 5 * n + row, tl.sum(second_s, 0), tl.sum(second_t, 0), n)


@triton.jit
def _entry_kernel(
    student, student_row, student_column, teacher, teacher_row, teacher_column, width,
    maxima, reciprocals, log_ratio, out, n,
    KIND: tl.constexpr, BETA: tl.constexpr, TEMPERATURE: tl.constexpr, CLIP: tl.constexpr, CLIP_MODE: tl.constexpr,
    KL: tl.constexpr, JSD: tl.constexpr, LOG1P: tl.constexpr,
    DTYPE: tl.constexpr, LOWEST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The six sums of EntrySums of one row into out [6, n]."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    top_s, top_t, per_s, per_t, ratio = _per_token(maxima, reciprocals, log_ratio, row, n)
    unclipped = tl.zeros((LANES,), DTYPE)
    loss = tl.zeros((LANES,), DTYPE)
    dlogps = tl.zeros((LANES,), DTYPE)
    count = tl.zeros((LANES,), DTYPE)
    log_s = tl.zeros((LANES,), DTYPE)
    log_t = tl.zeros((LANES,), DTYPE)
    for start in range(0, width, LANES * 8):
        z_s = _load(student, start, width, student_column, DTYPE, LANES)
        z_t = _load(teacher, start, width, teacher_column, DTYPE, LANES)
        p, q, d, z_s, z_t = _probabilities(z_s, z_t, top_s, top_t, per_s, per_t, ratio, TEMPERATURE)
        log_s += tl.sum(p * tl.maximum(z_s, LOWEST), 1)  # minus infinity times zero counts as zero
        log_t += tl.sum(q * tl.maximum(z_t, LOWEST), 1)
        value, clipped, dlogp, is_clipped = _forms(p, q, d, KIND, BETA, CLIP, CLIP_MODE, KL, JSD, LOG1P)
        unclipped += tl.sum(value, 1)
        dlogps += tl.sum(dlogp, 1)
        if CLIP_MODE != "none":
            loss += tl.sum(clipped, 1)
            count += tl.sum(tl.where(is_clipped, 1.0, 0.0).to(DTYPE), 1)
    if CLIP_MODE == "none":
        loss = unclipped
    out += row
    tl.store(out, tl.sum(unclipped, 0))
    tl.store(out + n, tl.sum(loss, 0))
    tl.store(out + 2 * n, tl.sum(dlogps, 0))
    tl.store(out + 3 * n, tl.sum(count, 0))
    tl.store(out + 4 * n, tl.sum(log_s, 0) * (1 / TEMPERATURE))
    tl.store(out + 5 * n, tl.sum(log_t, 0) * (1 / TEMPERATURE))


@triton.jit
def _gradient_kernel(
    student, student_row, student_column, teacher, teacher_row, teacher_column, width,
    maxima, reciprocals, log_ratio, dlogp_sum, scale, out, out_row, out_column, n,
    KIND: tl.constexpr, BETA: tl.constexpr, TEMPERATURE: tl.constexpr, CLIP: tl.constexpr, CLIP_MODE: tl.constexpr,
    KL: tl.constexpr, JSD: tl.constexpr, LOG1P: tl.constexpr,
    DTYPE: tl.constexpr, LOWEST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """scale (g - p G) of one row into out [n, width]."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    out += row * out_row
    top_s, top_t, per_s, per_t, ratio = _per_token(maxima, reciprocals, log_ratio, row, n)
    total = tl.load(dlogp_sum + row)
    factor = tl.load(scale + row)
    for start in range(0, width, LANES * 8):
        z_s = _load(student, start, width, student_column, DTYPE, LANES)
        z_t = _load(teacher, start, width, teacher_column, DTYPE, LANES)
        p, q, d, z_s, z_t = _probabilities(z_s, z_t, top_s, top_t, per_s, per_t, ratio, TEMPERATURE)
        _, _, dlogp, _ = _forms(p, q, d, KIND, BETA, CLIP, CLIP_MODE, KL, JSD, LOG1P)
        gradient = tl.where(factor == 0, 0.0, factor * (dlogp - p * total)).to(out.dtype.element_ty)
        columns = _columns(start, LANES)
        places = out + columns.to(tl.int64) * out_column
        if start + LANES * 8 <= width:
            tl.store(places, gradient)
        else:
            tl.store(places, gradient, columns < width)


@triton.jit
def _columns(start, LANES: tl.constexpr):
    """[LANES, 8] columns of a tile, a line of which is one thread's: sums along it need no other thread."""
    return start + tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _load(logits, start, width, stride, DTYPE: tl.constexpr, LANES: tl.constexpr):
    """A tile of a row, -inf beyond its end. A mask would forbid wide loads where the width is no multiple of 8."""
    columns = _columns(start, LANES)
    logits += columns.to(tl.int64) * stride  # more than 2^31 if transposed
    if start + LANES * 8 <= width:
        tile = tl.load(logits)
    else:
        tile = tl.load(logits, columns < width, -float("inf"))
    return tile.to(DTYPE)


@triton.jit
def _store_pair(places, student, teacher, n):
    tl.store(places, student)
    tl.store(places + n, teacher)


@triton.jit
def _raise(z, top, at, start, LOWEST: tl.constexpr, LANES: tl.constexpr):
    """The maximum so far, its first column, and the maximum before less it, both held finite."""
    highest = tl.max(tl.max(z, 1), 0)  # passes over NaN, which the sums will show
    before = tl.maximum(top, LOWEST)
    if highest > top:
        top = highest
        at = tl.min(tl.min(tl.where(z == highest, _columns(start, LANES), 2**31 - 1), 1), 0)
    return top, at, before - tl.maximum(top, LOWEST)


@triton.jit
def _exp(x, TEMPERATURE: tl.constexpr):
    """exp(x / temperature)"""
    return tl.exp2(x * (LOG_2_E / TEMPERATURE))


@triton.jit
def _expm1(x, TERMS: tl.constexpr):
    """exp(x) - 1 for |x| < 1: x (1 + x/2 (1 + x/3 (...)))."""
    result = x * 0
    for k in tl.static_range(TERMS, 0, -1):
        result = (result + 1) * x * (1 / k)
    return result


@triton.jit
def _per_token(maxima, reciprocals, log_ratio, row, n):
    """One row's maxima, reciprocals of its sums, and log-ratio."""
    per_s, per_t = tl.load(reciprocals + row), tl.load(reciprocals + n + row)
    return tl.load(maxima + row), tl.load(maxima + n + row), per_s, per_t, tl.load(log_ratio + row)


@triton.jit
def _probabilities(z_s, z_t, top_s, top_t, per_s, per_t, log_ratio, TEMPERATURE: tl.constexpr):
    """p, q, d = log q - log p (NaN where both logits are -inf), and both logits less their maxima."""
    d = ((z_t - z_s) - (top_t - top_s)) * (1 / TEMPERATURE) - log_ratio
    z_s -= top_s
    z_t -= top_t
    p = _exp(z_s, TEMPERATURE) * per_s
    q = _exp(z_t, TEMPERATURE) * per_t
    return p, q, d, z_s, z_t


@triton.jit
def _forms(
    p, q, d, KIND: tl.constexpr, BETA: tl.constexpr, CLIP: tl.constexpr, CLIP_MODE: tl.constexpr,
    KL: tl.constexpr, JSD: tl.constexpr, LOG1P: tl.constexpr,
):  # fmt: skip
    """f⁺, the clipped f⁺ and its dlogp, and whether the entry lies above the clip; see kinds.py and clips.py."""
    if KIND == "jsd":
        value, dlogp = _jsd(p, q, d, BETA, KL, JSD, LOG1P)
        raw, shift, shift_dlogp = value, 0.0, 0.0
    else:
        if KIND == "forward_kl":
            weight, other, x = q, p, d
        else:
            weight, other, x = p, q, -d
        raw = tl.where(weight > 0, weight * x, 0.0)  # 0 · inf is 0
        near = tl.abs(x) < SERIES_BELOW
        series = weight * _series(x, KL)
        shift = tl.where(near, series - raw, other - weight)
        value = tl.where(near, series, raw + shift)
        if KIND == "forward_kl":
            dlogp, shift_dlogp = shift, p
        else:
            dlogp, shift_dlogp = raw, -p
    clipped, is_clipped = value, raw > 0
    if CLIP_MODE == "entry":
        is_clipped = raw > CLIP
        clipped = tl.where(is_clipped, CLIP + shift, value)
        dlogp = tl.where(is_clipped, shift_dlogp, dlogp)
    elif CLIP_MODE == "saturate":
        is_clipped = value > CLIP
        clipped = CLIP * _log1p(value * (1 / CLIP), LOG1P)
        dlogp *= CLIP / (CLIP + value)
    return value, clipped, dlogp, is_clipped


@triton.jit
def _jsd(p, q, d, BETA: tl.constexpr, KL: tl.constexpr, JSD: tl.constexpr, LOG1P: tl.constexpr):
    """f and its dlogp. Of a and b the one that is smaller near d = 0 comes from a logarithm, the other is d away."""
    d = tl.minimum(tl.maximum(d, -FAR), FAR)  # no longer NaN
    x = d if BETA <= 0.5 else -d
    odds = tl.where(tl.abs(x) < SERIES_BELOW, x + _series(-x, KL), _exp(x, 1) - 1)
    smaller = -_log1p(odds * min(BETA, 1 - BETA), LOG1P)
    if BETA <= 0.5:
        a, b = x + smaller, smaller
    else:
        a, b = smaller, x + smaller
    dlogp = (1 - BETA) * p * b
    return tl.where(tl.abs(d) < SERIES_BELOW, q * _series(d, JSD), dlogp + BETA * q * a), dlogp


@triton.jit
def _series(x, COEFFICIENTS: tl.constexpr):
    """x² (c₀ + c₁ x + ...)"""
    result = x * COEFFICIENTS[len(COEFFICIENTS) - 1]
    for k in tl.static_range(len(COEFFICIENTS) - 2, -1, -1):
        result = (result + COEFFICIENTS[k]) * x
    return result * x


@triton.jit
def _log1p(y, LOG1P: tl.constexpr):
    """log(1 + y), relatively precise also near zero, by twos and a polynomial for what is left, 2/3 to 4/3."""
    u = 1 + y
    if y.dtype == tl.float64:
        result = tl.log(u) + (y - (u - 1)) / u
    else:
        bits = u.to(tl.int32, bitcast=True)
        twos = (bits - 0x3F2AAAAB) & -0x800000
        rest = tl.where(twos == 0, y, (bits - twos).to(tl.float32, bitcast=True) - 1)
        result = twos.to(tl.float32) * (LOG_2 * 2**-23) + (rest + _series(rest, LOG1P))
    return tl.where(u < float("inf"), result, u)
