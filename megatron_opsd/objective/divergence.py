"""The divergence over a vocabulary that is spread over ranks: one backend for each device, and three collectives."""

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.objective import backend_torch
from megatron_opsd.objective.clips import Clip, EntryClip, NoClip, Saturate, TokenClip, TokenLevel
from megatron_opsd.objective.kinds import JSD, ForwardKL, Kind, ReverseKL, SkewedKL
from megatron_opsd.objective.types import (
    DivergenceOutput,
    LocalSums,
    Logits,
    Normalizers,
    SavedForBackward,
    Tokens,
)
from megatron_opsd.objective.vocab_shard import VocabShard

KindName = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"]
ClipMode = Literal["entry", "token", "saturate"]


@dataclass(frozen=True)
class Divergence:
    """A divergence between student p and teacher q, both softmax(logits / temperature).

    kind         ``forward_kl`` KL(q || p), ``reverse_kl`` KL(p || q), or ``jsd``, the Jensen-Shannon divergence
                 beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (Lin 1991; in nats), or
                 ``skewed_kl`` KL(q || m) (Lee 1999). On a GPU ``skewed_kl`` runs in plain torch.
    beta         the teacher's share of the mixture, strictly between 0 and 1; only ``jsd`` and ``skewed_kl`` read it.
                 ``jsd`` vanishes at both ends, so these are not the KLs.
    temperature  divides both sides' logits.
    clip         a bound in nats, or None for no clip.
    clip_mode    ``entry`` caps each vocabulary entry's term (OPSD, arXiv 2601.18734), ``token`` caps each token's
                 divergence, ``saturate`` bends each entry's non-negative term to c log(1 + f/c).

    Raises ValueError, in one line, for a value outside these.
    """

    kind: KindName = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    clip: float | None = None
    clip_mode: ClipMode = "entry"

    def __post_init__(self) -> None:
        if self.kind not in get_args(KindName):
            raise ValueError(f"kind must be one of {', '.join(get_args(KindName))}, not {self.kind!r}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie strictly between 0 and 1, not {self.beta} (the ends are the KL kinds)")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, not {self.temperature}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be None or positive and finite, not {self.clip}")
        if self.clip_mode not in get_args(ClipMode):
            raise ValueError(f"clip_mode must be one of {', '.join(get_args(ClipMode))}, not {self.clip_mode!r}")

    @property
    def needs_teacher(self) -> bool:
        return True

    @cached_property
    def entry(self) -> Kind:
        """What one entry adds."""
        match self.kind:
            case "forward_kl":
                return ForwardKL()
            case "reverse_kl":
                return ReverseKL()
            case "jsd":
                return JSD(self.beta)
            case "skewed_kl":
                return SkewedKL(self.beta)

    @cached_property
    def clipping(self) -> Clip:
        """What becomes of it above the bound."""
        clips = {"entry": EntryClip, "token": TokenClip, "saturate": Saturate}
        return NoClip() if self.clip is None else clips[self.clip_mode](self.clip)

    def measure(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens, shard: VocabShard, vocab_size: int
    ) -> tuple[DivergenceOutput, SavedForBackward]:
        """Divergence and its companions per token, over the whole vocabulary: three all-reduces."""
        assert teacher is not None
        logits = Logits(student, teacher)
        temperatures = (self.temperature,) if tokens.ids is None or self.temperature == 1 else (self.temperature, 1.0)
        local: LocalSums = self._backend(student).normalizer_sums(logits, temperatures)
        maxima = shard.all_reduce(local.maxima.clone(), dist.ReduceOp.MAX)  # first

        behind = local.maxima - maxima
        sums = torch.cat([s * (behind / t).exp() for s, t in zip(local.sums, temperatures, strict=True)])
        # An all-reduce may add each row in its own order: only the difference is sure to be zero for identical models.
        difference = _rescaled_difference(local, behind / self.temperature)[None]
        *reduced, difference = shard.all_reduce(torch.cat([sums, difference]))  # second
        student_sum, teacher_sum, *unit_sums = reduced
        log_ratio = _log_ratio(student_sum, teacher_sum, difference)
        normalizers = Normalizers(maxima, torch.stack([student_sum, teacher_sum]), log_ratio)

        both_first = (local.maxima == maxima).all(0) & (local.top_ids[0] == local.top_ids[1])
        parts = [*self._backend(student).entry_sums(logits, normalizers, self), both_first.to(logits.dtype)]
        if tokens.ids is not None:
            (own, held), (other, _) = (shard.pick(side, tokens.ids) for side in logits)
            own, other = own.to(logits.dtype), other.to(logits.dtype)
            # The difference on its own: exact where both sides are close.
            picked = torch.stack([own - maxima[0], other - maxima[1], other - own - (maxima[1] - maxima[0])])
            parts += torch.where(held, picked, 0)
        sums = shard.all_reduce(torch.stack(parts))  # third
        sums[:4] += 0 * normalizers.sums.sum(0)  # a NaN logit spoils its token
        unclipped, loss, dlogp_sum, count, *log_means, agree = sums[:7]
        entropies = normalizers.sums.log() - torch.stack(log_means)

        sampled = student_logprobs = teacher_logprobs = None
        if tokens.ids is not None:
            known = (tokens.ids >= 0) & (tokens.ids < vocab_size)
            *centered, gap = torch.where(known, sums[7:], torch.nan)
            unit = unit_sums or list(normalizers.sums)
            student_logprobs, teacher_logprobs = (x - y.log() for x, y in zip(centered, unit, strict=True))
            own = centered[0] / self.temperature - student_sum.log()
            sampled = torch.stack([own, gap / self.temperature - log_ratio])
        capped = torch.zeros_like(unclipped, dtype=torch.bool)
        if isinstance(self.clipping, TokenLevel):
            loss, count, capped = self.clipping.tokens(unclipped)
        agree = agree.clamp(max=1)  # several ranks may hold the same highest logit
        output = DivergenceOutput(
            loss, unclipped, count, entropies[0], entropies[1], agree, student_logprobs, teacher_logprobs
        )
        return output, SavedForBackward(normalizers, dlogp_sum, capped, sampled)

    def write_gradient(
        self, student: Tensor, teacher: Tensor | None, saved: SavedForBackward, weights: Tensor, out: Tensor
    ) -> None:
        """(w/τ)(g - p G). G should vanish where nothing is clipped; p G then cancels the error of the normalizers.

        A token that its clip holds constant has gradient zero even if its divergence is infinite.
        """
        assert teacher is not None
        logits = Logits(student, teacher)
        scale = torch.where(saved.capped, 0, weights.to(logits.dtype) / self.temperature)
        self._backend(student).write_gradient(logits, saved, scale, self, out)

    def _backend(self, logits: Tensor) -> ModuleType:
        """The passes over the logits: both modules offer the same three functions."""
        if not logits.is_cuda:
            return backend_torch
        from megatron_opsd.objective import backend_triton  # a machine without a GPU need not have Triton

        return backend_triton if self.kind in backend_triton.KINDS else backend_torch


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
