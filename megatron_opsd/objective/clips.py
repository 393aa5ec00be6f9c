"""The clips: what becomes of an entry's or a token's divergence above a bound.

To add one: a class here, its name in ``Divergence``, its lines in reference.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_opsd.objective.kinds import Forms


class Clipped(NamedTuple):
    """The clipped f⁺ of entries, its ∂/∂log p, and 1 where the entry lies above the bound."""

    value: Tensor
    dlogp: Tensor
    is_clipped: Tensor


class ClippedTokens(NamedTuple):
    """Tokens' losses, 1 where the token lies above the bound, and which tokens the clip holds constant, [n] each."""

    loss: Tensor
    clip_count: Tensor
    capped: Tensor


class EntryLevel(ABC):
    """Acts on each entry before the sum over the vocabulary; may write into the forms, some of which may be one tensor.

    dlogp_needs: whether ``dlogp`` reads the raw form, and the value.
    """

    dlogp_needs: ClassVar[tuple[bool, bool]]

    @abstractmethod
    def entries(self, forms: Forms) -> Clipped: ...

    @abstractmethod
    def dlogp(self, forms: Forms) -> Tensor: ...


class TokenLevel(ABC):
    """Acts on the sum over the whole vocabulary."""

    @abstractmethod
    def tokens(self, unclipped: Tensor) -> ClippedTokens: ...


Clip = EntryLevel | TokenLevel


class NoClip(TokenLevel):
    def tokens(self, unclipped: Tensor) -> ClippedTokens:
        return ClippedTokens(
            unclipped.clone(), torch.zeros_like(unclipped), torch.zeros_like(unclipped, dtype=torch.bool)
        )


@dataclass(frozen=True)
class TokenClip(TokenLevel):
    """min(F⁺, c)."""

    size: float

    def tokens(self, unclipped: Tensor) -> ClippedTokens:
        capped = unclipped > self.size
        return ClippedTokens(unclipped.clamp(max=self.size), capped.to(unclipped.dtype), capped)


@dataclass(frozen=True)
class EntryClip(EntryLevel):
    """min(f, c) + shift, whose sum is Σ min(f, c): the clip of OPSD (arXiv 2601.18734)."""

    size: float
    dlogp_needs = (True, False)

    def entries(self, forms: Forms) -> Clipped:
        assert forms.raw is not None
        assert forms.value is not None
        is_clipped = _above(forms.raw, self.size)
        if forms.shift is None:
            dlogp = self.dlogp(forms)
            return Clipped(forms.value.clamp_(max=self.size), dlogp, is_clipped)
        value = torch.where(forms.raw > self.size, self.size + forms.shift, forms.value)
        return Clipped(value, self.dlogp(forms), is_clipped)

    def dlogp(self, forms: Forms) -> Tensor:
        """A capped entry keeps its shift's dlogp, for the other entries' shifts count on it to cancel."""
        assert forms.raw is not None
        if forms.shift_dlogp is None:
            return forms.dlogp.mul_(forms.raw.le_(self.size))
        return torch.where(forms.raw > self.size, forms.shift_dlogp, forms.dlogp)


@dataclass(frozen=True)
class Saturate(EntryLevel):
    """c log(1 + f⁺/c)."""

    size: float
    dlogp_needs = (True, True)

    def entries(self, forms: Forms) -> Clipped:
        assert forms.value is not None
        is_clipped = _above(forms.value, self.size)
        dlogp = self.dlogp(forms)
        return Clipped(forms.value.div_(self.size).log1p_().mul_(self.size), dlogp, is_clipped)

    def dlogp(self, forms: Forms) -> Tensor:
        assert forms.value is not None
        return forms.dlogp * (self.size / (self.size + forms.value))


def _above(values: Tensor, size: float) -> Tensor:
    """1 or 0 in the dtype of the values: a CPU is slow at counting booleans."""
    return torch.gt(values, size, out=torch.empty_like(values))
