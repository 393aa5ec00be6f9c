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
infinite or, both being zero, NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opsd.objective.spec import Divergence

SERIES_BELOW = 0.1
# (x + expm1(-x)) / x² = 1/2! - x/3! + x²/4! - ...; up to SERIES_BELOW the first omitted term is under 1e-12 of the sum.
SERIES = (1 / 2, -1 / 6, 1 / 24, -1 / 120, 1 / 720, -1 / 5040, 1 / 40320)


class Forms(NamedTuple):
    """The table's columns, and ∂shift/∂log p, so that ∂f/∂log p = slope - shift_slope."""

    raw: Tensor
    value: Tensor
    slope: Tensor
    shift: Tensor
    shift_slope: Tensor


class Clipped(NamedTuple):
    """What a token sums over the vocabulary: loss, ∂loss/∂log p, and 1 where the entry lies above the clip."""

    value: Tensor
    slope: Tensor
    above: Tensor


def entry_forms(p: Tensor, q: Tensor, d: Tensor, spec: Divergence) -> Forms:
    """The forms of ``spec.kind`` for probabilities p, q and d = log q - log p, all of one shape and dtype."""
    if spec.kind == "forward_kl":
        difference = _difference(p, q, d)
        return Forms(_times(q, d), _excess(q, p, d), difference, shift=difference, shift_slope=p)
    if spec.kind == "reverse_kl":
        raw = _times(p, -d)
        return Forms(raw, _excess(p, q, -d), raw, shift=-_difference(p, q, d), shift_slope=-p)
    a, b = _log_ratios_to_mixture(d, spec.beta)
    mixture = spec.beta * q + (1 - spec.beta) * p
    value = spec.beta * _excess(q, mixture, a) + (1 - spec.beta) * _excess(p, mixture, b)
    zero = torch.zeros_like(value)
    return Forms(value, value, (1 - spec.beta) * _times(p, b), shift=zero, shift_slope=zero)


def clip_entries(forms: Forms, spec: Divergence) -> Clipped:
    """Apply an entry-wise clip; ``token`` clips and no clip leave the forms as they are.

    ``entry`` caps the raw form: min(f, c) + shift, whose sum is Σ min(f, c). A capped entry keeps its shift's slope,
    for the other entries' shifts count on it to cancel. ``saturate`` bends f⁺ to c log(1 + f⁺/c).
    """
    clip = spec.clip
    if clip is None or spec.clip_mode == "token":
        return Clipped(forms.value, forms.slope, torch.zeros_like(forms.value))
    if spec.clip_mode == "entry":
        above = forms.raw > clip
        value = torch.where(above, clip + forms.shift, forms.value)
        return Clipped(value, torch.where(above, forms.shift_slope, forms.slope), above)
    value = clip * torch.log1p(forms.value / clip)
    return Clipped(value, forms.slope * (clip / (clip + forms.value)), forms.value > clip)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight · x, and 0 where the weight is 0, whatever x."""
    return torch.where(weight == 0, 0, weight * x)


def _excess(weight: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """weight · (x + expm1(-x)) >= 0, where other = weight · exp(-x).

    Three ranges: a series where the two terms cancel, the formula itself, and below -1, where exp(-x) could overflow
    while the weight underflows, ``other`` in the place of their product. A zero weight leaves ``other``, the limit.
    """
    series = torch.full_like(x, SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        series = series * x + coefficient
    excess = torch.where(x.abs() < SERIES_BELOW, x * x * series, x + torch.expm1(-x))
    value = torch.where(x < -1, other + weight * (x - 1), weight * excess)
    return torch.where(weight == 0, other, value)


def _difference(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p - q, to the precision of d where they are close."""
    return torch.where(d.abs() < 1, q * torch.expm1(-d), p - q)


def _log_ratios_to_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """a = log(q/m) and b = log(p/m) from exp(-|d|), which cannot overflow and keeps a small d's digits."""
    teacher_higher = d >= 0
    share = torch.full_like(d, beta).masked_fill_(teacher_higher, 1 - beta)
    log_ratio = -torch.log1p(share * torch.expm1(-d.abs()))  # of the higher one to the mixture
    return torch.where(teacher_higher, log_ratio, log_ratio + d), torch.where(teacher_higher, log_ratio - d, log_ratio)
