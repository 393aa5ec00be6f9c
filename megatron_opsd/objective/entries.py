"""One vocabulary entry's part of the divergence: its raw form f, its non-negative form f⁺, and their clips.

p is the student's probability, q the teacher's, d = log q - log p; every function is elementwise. Since
Σ(q - p) = 0, adding ±(p - q) to an entry changes no sum over the vocabulary: f⁺ = f + shift is non-negative and of
second order in d (Schulman's k3 estimator, http://joschu.net/blog/kl-approx.html, entry by entry), where the
textbook f is of first order and its sum cancels.

             f                      f⁺                                          g⁺ = ∂f⁺/∂log p     shift
forward_kl   q d                    q (d + expm1(-d))                           q expm1(-d)         p - q
reverse_kl   -p d                   p (expm1(d) - d)                            -p d                q - p
jsd          βq a + (1-β)p b        βq (a + expm1(-a)) + (1-β)p (b + expm1(-b)) (1-β)p b            0

with m = βq + (1-β)p, a = log(q/m), b = log(p/m). A probability of zero contributes its limit, also where d is
infinite. Elementwise selection costs a CPU ten times an exponential, so the ranges of d are joined by arithmetic.
"""

from functools import cache
from math import factorial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_opsd.objective.spec import Divergence

# f⁺ is its series while |d| is below this and its formula from twice this on; between them it is a mean of the two.
SERIES_BELOW = 0.1
# How many terms leave out less than 1e-7 (float64: 1e-12) of the sum there.
TERMS = {torch.float32: 5, torch.float64: 9}
# Beyond this d, either way, the lower probability adds nothing to jsd that float64 could hold.
FARTHEST = 40.0


class Forms(NamedTuple):
    """The table's columns, and ∂shift/∂log p, so that ∂f/∂log p = slope - shift_slope. jsd has no shift."""

    raw: Tensor
    slope: Tensor
    value: Tensor | None = None
    shift: Tensor | None = None
    shift_slope: Tensor | None = None


def entry_forms(p: Tensor, q: Tensor, d: Tensor, spec: Divergence, *, with_value: bool = True) -> Forms:
    """The forms of ``spec.kind`` for probabilities p, q and d = log q - log p, all of one shape and dtype.

    d may be infinite but not NaN. ``with_value=False`` leaves out what only the loss needs: f⁺, reverse KL's shift.
    """
    if spec.kind == "jsd":
        return _jsd_forms(p, q, d, spec.beta, with_value)
    forward = spec.kind == "forward_kl"
    weight, x = (q, d) if forward else (p, -d)
    raw = (weight * x).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # 0 · inf is 0
    shift_slope = p if forward else -p
    if not (forward or with_value):
        return Forms(raw, raw, shift_slope=shift_slope)
    # the other probability - weight, to its own precision where they are close: (q - p)/(q + p) = tanh(d/2)
    shift = (p + q).mul_((x * -0.5).tanh_())
    value = _join(_series(x, _kl_coefficients(TERMS[x.dtype])).mul_(weight), raw + shift, x) if with_value else None
    return Forms(raw, shift if forward else raw, value, shift, shift_slope)


def _jsd_forms(p: Tensor, q: Tensor, d: Tensor, beta: float, with_value: bool) -> Forms:
    # Of a and b the one that is smaller near d = 0 comes from a logarithm, the other is d away from it.
    share, near = (beta, d) if beta <= 0.5 else (1 - beta, -d)
    near = near.clamp(-FARTHEST, FARTHEST)
    odds = near.exp().add_(1).mul_((near * 0.5).tanh_())  # expm1, at half of torch's cost
    smaller = odds.mul_(share).log1p_().neg_()
    larger = near.add_(smaller)
    a, b = (larger, smaller) if beta <= 0.5 else (smaller, larger)
    slope = b.mul_(p).mul_(1 - beta)
    raw = torch.addcmul(slope, q, a, value=beta)
    if not with_value:
        return Forms(raw, slope)
    return Forms(raw, slope, _join(_series(d, _jsd_coefficients(beta, TERMS[d.dtype])).mul_(q), raw, d))


def clip_slope(forms: Forms, spec: Divergence) -> Tensor:
    """∂loss/∂log p of the clipped entries. ``token`` clips and no clip leave it as it is.

    An entry capped by an ``entry`` clip keeps its shift's slope, for the other entries' shifts count on it to cancel.
    """
    if spec.clip is None or spec.clip_mode == "token":
        return forms.slope
    if spec.clip_mode == "saturate":
        assert forms.value is not None
        return forms.slope * (spec.clip / (spec.clip + forms.value))
    if forms.shift_slope is None:
        return forms.slope * _indicator(forms.raw, torch.le, spec.clip)
    return torch.where(forms.raw > spec.clip, forms.shift_slope, forms.slope)


def clip_value(forms: Forms, spec: Divergence) -> tuple[Tensor, Tensor]:
    """The clipped f⁺, and 1 where the entry lies above the clip; only for ``entry`` and ``saturate``.

    ``entry`` caps the raw form: min(f, c) + shift, whose sum is Σ min(f, c). ``saturate`` bends f⁺ to c log(1 + f⁺/c).
    """
    clip, value = spec.clip, forms.value
    assert clip is not None
    assert value is not None
    if spec.clip_mode == "saturate":
        return (value / clip).log1p_().mul_(clip), _indicator(value, torch.gt, clip)
    if forms.shift is None:
        return value.clamp(max=clip), _indicator(forms.raw, torch.gt, clip)
    above = forms.raw > clip
    return torch.where(above, clip + forms.shift, value), above


def _indicator(x: Tensor, compare: Any, bound: float) -> Tensor:
    """1 where the comparison holds, else 0, in x's dtype: a CPU counts and multiplies booleans slowly."""
    return compare(x, bound, out=torch.empty_like(x))


def _series(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """x² (c₀ + c₁ x + ...) for small x, bounded for any."""
    x = x.clamp(-2 * SERIES_BELOW, 2 * SERIES_BELOW)
    series = x * coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        series.add_(coefficient).mul_(x)
    return series.mul_(x)


@cache
def _kl_coefficients(terms: int) -> tuple[float, ...]:
    """Of x + expm1(-x) = x²/2! - x³/3! + ..."""
    return tuple((-1) ** k / factorial(k) for k in range(2, terms + 2))


@cache
def _jsd_coefficients(beta: float, terms: int) -> tuple[float, ...]:
    """Of f/q = -M log M - (1-β) d exp(-d) with M = m/q = β + (1-β) exp(-d), by powers of d from the second."""
    exp = [(-1) ** k / factorial(k) for k in range(terms + 2)]
    m = [1.0] + [(1 - beta) * e for e in exp[1:]]
    log = [0.0]  # M (log M)' = M'
    for k in range(1, terms + 2):
        log.append(m[k] - sum(j * log[j] * m[k - j] for j in range(1, k)) / k)
    return tuple(-sum(m[j] * log[k - j] for j in range(k + 1)) - (1 - beta) * exp[k - 1] for k in range(2, terms + 2))


def _join(series: Tensor, formula: Tensor, d: Tensor) -> Tensor:
    """The series near zero, the formula far from it. Each is finite where the other alone is wanted; writes in both."""
    weight = d.abs().sub_(SERIES_BELOW).mul_(1 / SERIES_BELOW).clamp_(0, 1)
    return torch.addcmul(series.addcmul_(series, weight, value=-1), formula, weight)
