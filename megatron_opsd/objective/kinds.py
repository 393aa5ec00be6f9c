"""The kinds of divergence: what one vocabulary entry adds, as its raw form f and its non-negative form f⁺.

p is the student's probability, q the teacher's, d = log q - log p; every function is elementwise. Since
Σ(q - p) = 0, adding ±(p - q) to an entry changes no sum over the vocabulary: f⁺ = f + shift is non-negative and of
second order in d (Schulman's k3 estimator, http://joschu.net/blog/kl-approx.html, entry by entry), where the
textbook f is of first order and its sum cancels.

             f                      f⁺                                          g⁺ = ∂f⁺/∂log p     shift
forward_kl   q d                    q (d + expm1(-d))                           q expm1(-d)         p - q
reverse_kl   -p d                   p (expm1(d) - d)                            -p d                q - p
jsd          βq a + (1-β)p b        βq (a + expm1(-a)) + (1-β)p (b + expm1(-b)) (1-β)p b            0
skewed_kl    q a                    q (a + expm1(-a))                           (m - q) (1-β)p/m    m - q

with m = βq + (1-β)p, a = log(q/m), b = log(p/m). A probability of zero contributes its limit, also where d is
infinite. Elementwise selection costs a CPU ten times an exponential, so arithmetic joins the ranges of d.
"""

from dataclasses import dataclass
from functools import cache
from math import factorial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# f⁺ is its series while |d| is below this and its formula from twice this on; between them it is a mean of the two.
SERIES_BELOW = 0.1
# How many terms leave out less than 1e-7 (float64: 1e-12) of the sum there.
TERMS = {torch.float32: 5, torch.float64: 9}
# Beyond this d, either way, the lower probability adds nothing to jsd that float64 could hold.
FARTHEST = 40.0


class Forms(NamedTuple):
    """The table's columns, and ∂shift/∂log p, so that ∂f/∂log p = dlogp - shift_dlogp. jsd has no shift.

    A form that the caller did not ask for may be None.
    """

    dlogp: Tensor
    raw: Tensor | None = None
    value: Tensor | None = None
    shift: Tensor | None = None
    shift_dlogp: Tensor | None = None


class Kind(Protocol):
    """A divergence, entry by entry. To add one: a class here, its name in ``Divergence``, its lines in reference.py."""

    def forms(self, p: Tensor, q: Tensor, d: Tensor, needs_raw: bool = True, needs_value: bool = True) -> Forms:
        """The forms for probabilities p, q and d = log q - log p, all of one shape and dtype.

        d may be infinite but not NaN.
        """
        ...


class ForwardKL:
    """KL(q || p)."""

    def forms(self, p: Tensor, q: Tensor, d: Tensor, needs_raw: bool = True, needs_value: bool = True) -> Forms:
        raw, shift, value = _kl_forms(q, p, d, needs_value)
        return Forms(shift, raw, value, shift, p)


class ReverseKL:
    """KL(p || q)."""

    def forms(self, p: Tensor, q: Tensor, d: Tensor, needs_raw: bool = True, needs_value: bool = True) -> Forms:
        if not needs_value:
            raw = _times(p, -d)
            return Forms(raw, raw, shift_dlogp=-p)
        raw, shift, value = _kl_forms(p, q, -d, needs_value)
        return Forms(raw, raw, value, shift, -p)


@dataclass(frozen=True)
class SkewedKL:
    """KL(q || m) with m = βq + (1-β)p (Lee 1999, as α-skew divergence; arXiv 2402.03898 distils with it)."""

    beta: float

    def forms(self, p: Tensor, q: Tensor, d: Tensor, needs_raw: bool = True, needs_value: bool = True) -> Forms:
        d = d.clamp(-FARTHEST, FARTHEST)
        a, _ = _logs_to_mixture(d, self.beta)
        m = q * self.beta + p * (1 - self.beta)
        raw, shift, value = _kl_forms(q, m, a, needs_value)
        share = (a - d).exp_().mul_(1 - self.beta)  # ∂log m/∂log p = (1-β)p/m
        return Forms(shift * share, raw, value, shift, m * share)


@dataclass(frozen=True)
class JSD:
    """β KL(q || m) + (1-β) KL(p || m) with m = βq + (1-β)p."""

    beta: float

    def forms(self, p: Tensor, q: Tensor, d: Tensor, needs_raw: bool = True, needs_value: bool = True) -> Forms:
        a, b = _logs_to_mixture(d.clamp(-FARTHEST, FARTHEST), self.beta)
        dlogp = (b * p).mul_(1 - self.beta)
        if not needs_raw:
            return Forms(dlogp)
        raw = torch.addcmul(dlogp, q, a, value=self.beta)
        if not needs_value:
            return Forms(dlogp, raw)
        return Forms(dlogp, raw, _join(_series(d, jsd_coefficients(self.beta, TERMS[d.dtype])).mul_(q), raw, d))


def _kl_forms(weight: Tensor, other: Tensor, x: Tensor, needs_value: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight·x, other - weight and weight (x + expm1(-x)), for x = log weight - log other."""
    raw = _times(weight, x)
    # other - weight, to its own precision where they are close: (other - weight)/(other + weight) = tanh(-x/2)
    shift = (other + weight).mul_((x * -0.5).tanh_())
    if not needs_value:
        return raw, shift, None
    return raw, shift, _join(_series(x, kl_coefficients(TERMS[x.dtype])).mul_(weight), raw + shift, x)


def _times(probability: Tensor, x: Tensor) -> Tensor:
    """probability·x, where 0 · inf is 0."""
    return (probability * x).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _logs_to_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """a = log(q/m) and b = log(p/m) for finite d = log q - log p."""
    # The one that is smaller near d = 0 comes from a logarithm, the other is d away from it.
    share, near = (beta, d) if beta <= 0.5 else (1 - beta, -d)
    odds = near.exp().add_(1).mul_((near * 0.5).tanh_())  # expm1, at half of torch's cost
    smaller = odds.mul_(share).log1p_().neg_()
    return (d + smaller, smaller) if beta <= 0.5 else (smaller, smaller - d)


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
