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
from typing import NamedTuple

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
    """The table's columns, and ∂shift/∂log p, so that ∂f/∂log p = dlogp - shift_dlogp. jsd has no shift.

    For a gradient, those that its clip does not ask for may be None.
    """

    dlogp: Tensor
    raw: Tensor | None = None
    value: Tensor | None = None
    shift: Tensor | None = None
    shift_dlogp: Tensor | None = None


def entry_forms(p: Tensor, q: Tensor, d: Tensor, spec: Divergence, *, gradient_only: bool = False) -> Forms:
    """The forms of ``spec.kind`` for probabilities p, q and d = log q - log p, all of one shape and dtype.

    d may be infinite but not NaN. ``gradient_only`` leaves out what ``clip_dlogp`` does not need.
    """
    clip_mode = None if spec.clip is None else spec.clip_mode
    needs_raw = not gradient_only or clip_mode in ("entry", "saturate")
    needs_value = not gradient_only or clip_mode == "saturate"
    if spec.kind == "jsd":
        dlogp, raw = _jsd_dlogp_and_raw(p, q, d, spec.beta, needs_raw)
        if raw is None or not needs_value:
            return Forms(dlogp, raw)
        return Forms(dlogp, raw, _join(_series(d, jsd_coefficients(spec.beta, TERMS[d.dtype])).mul_(q), raw, d))
    forward = spec.kind == "forward_kl"
    weight, x = (q, d) if forward else (p, -d)
    raw = (weight * x).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # 0 · inf is 0
    shift_dlogp = p if forward else -p
    if not (forward or needs_value):
        return Forms(raw, raw, shift_dlogp=shift_dlogp)
    # the other probability - weight, to its own precision where they are close: (q - p)/(q + p) = tanh(d/2)
    shift = (p + q).mul_((x * -0.5).tanh_())
    value = None
    if needs_value:
        value = _join(_series(x, kl_coefficients(TERMS[x.dtype])).mul_(weight), raw + shift, x)
    return Forms(shift if forward else raw, raw, value, shift, shift_dlogp)


def _jsd_dlogp_and_raw(p: Tensor, q: Tensor, d: Tensor, beta: float, needs_raw: bool) -> tuple[Tensor, Tensor | None]:
    # Of a and b the one that is smaller near d = 0 comes from a logarithm, the other is d away from it.
    share, near = (beta, d) if beta <= 0.5 else (1 - beta, -d)
    near = near.clamp(-FARTHEST, FARTHEST)
    odds = near.exp().add_(1).mul_((near * 0.5).tanh_())  # expm1, at half of torch's cost
    smaller = odds.mul_(share).log1p_().neg_()
    if beta <= 0.5:
        dlogp = (smaller * p).mul_(1 - beta)
        return dlogp, torch.addcmul(dlogp, q, near.add_(smaller), value=beta) if needs_raw else None
    dlogp = near.add_(smaller).mul_(p).mul_(1 - beta)
    return dlogp, torch.addcmul(dlogp, q, smaller, value=beta) if needs_raw else None


class Clipped(NamedTuple):
    """The clipped f⁺, its ∂/∂log p, and 1 where the entry lies above the clip."""

    value: Tensor
    dlogp: Tensor
    is_clipped: Tensor


def clip_entries(forms: Forms, spec: Divergence) -> Clipped:
    """An ``entry`` or ``saturate`` clip's effect; may write into ``forms``.

    ``entry`` caps the raw form: min(f, c) + shift, whose sum is Σ min(f, c). ``saturate`` bends f⁺ to c log(1 + f⁺/c).
    """
    assert spec.clip is not None
    assert forms.raw is not None
    assert forms.value is not None
    # A CPU is slow at counting and multiplying booleans.
    measured = forms.value if spec.clip_mode == "saturate" else forms.raw
    is_clipped = torch.gt(measured, spec.clip, out=torch.empty_like(measured))
    if forms.shift is not None and spec.clip_mode == "entry":
        value = torch.where(forms.raw > spec.clip, spec.clip + forms.shift, forms.value)
        return Clipped(value, clip_dlogp(forms, spec), is_clipped)
    dlogp = clip_dlogp(forms, spec)
    if spec.clip_mode == "entry":
        return Clipped(forms.value.clamp_(max=spec.clip), dlogp, is_clipped)
    return Clipped(forms.value.div_(spec.clip).log1p_().mul_(spec.clip), dlogp, is_clipped)


def clip_dlogp(forms: Forms, spec: Divergence) -> Tensor:
    """∂loss/∂log p of the clipped entries; may write into ``forms``. ``token`` clips and no clip leave it as it is.

    An entry capped by an ``entry`` clip keeps its shift's dlogp, for the other entries' shifts count on it to cancel.
    """
    if spec.clip is None or spec.clip_mode == "token":
        return forms.dlogp
    if spec.clip_mode == "saturate":
        assert forms.value is not None
        return forms.dlogp * (spec.clip / (spec.clip + forms.value))
    assert forms.raw is not None
    if forms.shift_dlogp is None:
        return forms.dlogp.mul_(forms.raw.le_(spec.clip))
    return torch.where(forms.raw > spec.clip, forms.shift_dlogp, forms.dlogp)


def _series(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """x² (c₀ + c₁ x + ...) for small x, bounded for any."""
    x = x.clamp(-2 * SERIES_BELOW, 2 * SERIES_BELOW)
    series = x * coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        series.add_(coefficient).mul_(x)
    return series.mul_(x)


@cache
def kl_coefficients(terms: int) -> tuple[float, ...]:
    """Of x + expm1(-x) = x²/2! - x³/3! + ..."""
    return tuple((-1) ** k / factorial(k) for k in range(2, terms + 2))


@cache
def jsd_coefficients(beta: float, terms: int) -> tuple[float, ...]:
    """Of f/q = -M log M - (1-β) d exp(-d) with M = m/q = β + (1-β) exp(-d), by powers of d from the second."""
    exp = [(-1) ** k / factorial(k) for k in range(terms + 2)]
    m = [1.0] + [(1 - beta) * e for e in exp[1:]]
    log = [0.0]  # M (log M)' = M'
    for k in range(1, terms + 2):
        log.append(m[k] - sum(j * log[j] * m[k - j] for j in range(1, k)) / k)
    return tuple(-sum(m[j] * log[k - j] for j in range(k + 1)) - (1 - beta) * exp[k - 1] for k in range(2, terms + 2))


def _join(series: Tensor, formula: Tensor, d: Tensor) -> Tensor:
    """The series near zero, the formula far from it. Each is finite where the other counts alone; takes the series."""
    weight = d.abs().sub_(SERIES_BELOW).mul_(1 / SERIES_BELOW).clamp_(0, 1)
    return series.addcmul_(series, weight, value=-1).addcmul_(formula, weight)
