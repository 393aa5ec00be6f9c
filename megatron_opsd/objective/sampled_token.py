"""The loss of the tokens that were sampled: a policy gradient, or a log-likelihood."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.objective.divergence import Divergence
from megatron_opsd.objective.types import DivergenceOutput, PolicyOutput, Tokens
from megatron_opsd.objective.vocab_shard import VocabShard

Advantage = Literal["given", "teacher"]


class Saved(NamedTuple):
    """What the gradient needs besides the logits, [n] each."""

    maximum: Tensor
    total: Tensor  # Σ exp((logit - maximum) / temperature) over the whole vocabulary
    advantages: Tensor
    columns: Tensor  # of the sampled tokens in this rank's logits; outside of them where another rank holds them


@dataclass(frozen=True)
class SampledToken:
    """-A log p(y) of each sampled token y, with p = softmax(logits / temperature) and A held constant.

    advantage         ``given``: A of ``Tokens.advantages`` (1 where there are none: the log-likelihood, as SFT and STaR
                      want it). ``teacher``: A = log q(y) - log p(y), the sampled-token form of OPSD (arXiv
                      2601.18734), whose mean over samples of p has the gradient of KL(p || q).
    temperature       divides all logits. A policy gradient is unbiased only for tokens sampled at this temperature.
    importance_cap    multiplies A by min(exp(log p - log p_rollout), cap), held constant, both at temperature 1: for
                      tokens that another policy, such as vLLM's rounding of this one, has sampled. None for no factor.

    With a teacher the values per token are those of the unclipped ``reverse_kl`` divergence but for the loss.

    Raises ValueError, in one line, for a value outside these.
    """

    temperature: float = 1.0
    advantage: Advantage = "given"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, not {self.temperature}")
        if self.advantage not in get_args(Advantage):
            raise ValueError(f"advantage must be one of {', '.join(get_args(Advantage))}, not {self.advantage!r}")
        if self.importance_cap is not None and not 0 < self.importance_cap < math.inf:
            raise ValueError(f"importance_cap must be None or positive and finite, not {self.importance_cap}")

    @property
    def needs_teacher(self) -> bool:
        return self.advantage == "teacher"

    def measure(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens, shard: VocabShard, vocab_size: int
    ) -> tuple[DivergenceOutput | PolicyOutput, Saved]:
        """Two all-reduces without a teacher, three with one."""
        if tokens.ids is None or (self.importance_cap is not None and tokens.rollout_logprobs is None):
            raise ValueError("a loss of sampled tokens needs their ids, and with importance_cap their rollout_logprobs")
        if teacher is None:
            policy = _measure_policy(student, tokens.ids, self.temperature, shard, vocab_size)
            advantages = torch.ones_like(policy.logprobs) if tokens.advantages is None else tokens.advantages
            values = PolicyOutput(policy.logprobs, policy.entropy, policy.unit_logprobs)
        else:
            divergence = Divergence("reverse_kl", temperature=self.temperature)
            values, measured = divergence.measure(student, teacher, tokens, shard, vocab_size)
            assert measured.sampled is not None
            assert values.student_logprobs is not None
            (maximum, _), (total, _), _ = measured.normalizers
            logprobs, advantages = measured.sampled
            policy = _Policy(maximum, total, logprobs, values.student_logprobs, values.entropy_student)
        if self.importance_cap is not None:
            assert tokens.rollout_logprobs is not None
            ratio = (policy.unit_logprobs - tokens.rollout_logprobs).exp()
            advantages = advantages * ratio.clamp(max=self.importance_cap)
        # An id outside the vocabulary makes the gradient NaN too, not only the loss.
        advantages = torch.where(policy.logprobs.isnan(), torch.nan, advantages).to(policy.logprobs.dtype)
        saved = Saved(policy.maximum, policy.total, advantages, tokens.ids - shard.start)
        return values._replace(loss=-advantages * policy.logprobs), saved

    def write_gradient(
        self, student: Tensor, teacher: Tensor | None, saved: Saved, weights: Tensor, out: Tensor
    ) -> None:
        """(w A/τ)(p - 1 at y)."""
        width = student.shape[1]
        if width == 0:
            return
        scale = torch.where(weights == 0, 0, weights * saved.advantages / self.temperature).to(saved.total.dtype)
        held = (saved.columns >= 0) & (saved.columns < width)
        one = torch.where(held, scale, 0)[:, None]
        columns = saved.columns.clamp(0, width - 1)[:, None]
        for rows in _row_tiles(student):
            centered = student[rows].to(saved.total.dtype) - saved.maximum[rows, None]
            gradient = centered.div_(self.temperature).exp_().mul_((scale / saved.total)[rows, None])
            gradient.scatter_add_(1, columns[rows], -one[rows])
            out[rows] = gradient.masked_fill_((scale == 0)[rows, None], 0)


class _Policy(NamedTuple):
    """The student's distribution, [n] each."""

    maximum: Tensor
    total: Tensor  # Σ exp((logit - maximum) / temperature)
    logprobs: Tensor  # of the sampled tokens, at the temperature
    unit_logprobs: Tensor  # at temperature 1
    entropy: Tensor


def _measure_policy(logits: Tensor, ids: Tensor, temperature: float, shard: VocabShard, vocab_size: int) -> _Policy:
    n, width = logits.shape
    dtype = torch.promote_types(torch.float32, logits.dtype)
    lowest = torch.finfo(dtype).min
    local = logits.amax(-1).to(dtype) if width else logits.new_full((n,), -torch.inf, dtype=dtype)
    maximum = shard.all_reduce(local.clone(), dist.ReduceOp.MAX)
    sums = torch.zeros(4, n, dtype=dtype, device=logits.device)  # total, total at 1, Σ exp(x) x, the token's logit
    for rows in _row_tiles(logits):
        x = logits[rows].to(dtype) - maximum[rows, None]
        scaled = x / temperature
        exp = scaled.exp()
        sums[0, rows] = exp.sum(-1)
        sums[1, rows] = exp.sum(-1) if temperature == 1 else x.exp().sum(-1)
        sums[2, rows] = scaled.clamp_(min=lowest).mul_(exp).sum(-1)
    logit, held = shard.pick(logits, ids)
    sums[3] = torch.where(held, logit.to(dtype) - maximum, 0)
    total, unit_total, weighted, logit = shard.all_reduce(sums)
    logit = torch.where((ids >= 0) & (ids < vocab_size), logit, torch.nan)
    return _Policy(
        maximum,
        total,
        logprobs=logit / temperature - total.log(),
        unit_logprobs=logit - unit_total.log(),
        entropy=total.log() - weighted / total,
    )


def _row_tiles(logits: Tensor) -> Iterator[slice]:
    """Rows whose temporaries fit a CPU's cache, or a quarter of a GiB of a GPU."""
    n, width = logits.shape
    step = max(1, (2**26 if logits.is_cuda else 2**17) // max(1, width))
    return (slice(start, start + step) for start in range(0, n, step))
