"""The objective as a textbook writes it, on whole logits with torch autograd. The tests hold everything else to it.

In float64: near teacher = student these forms lose all digits in float32 (docs/numerics.md).
"""

import torch
from torch import Tensor

from megatron_opsd.objective.divergence import Divergence
from megatron_opsd.objective.sampled_token import SampledToken
from megatron_opsd.objective.types import Tokens


def reference(student: Tensor, teacher: Tensor, spec: Divergence) -> dict[str, Tensor]:
    """Every output for logits [n, v] without padding; differentiable in ``student``."""
    log_p, log_q = (torch.log_softmax(x / spec.temperature, -1) for x in (student, teacher.detach()))
    p, q = log_p.exp(), log_q.exp()
    if spec.kind == "forward_kl":
        entry = q * (log_q - log_p)
        positive = entry + p - q
    elif spec.kind == "reverse_kl":
        entry = p * (log_p - log_q)
        positive = entry + q - p
    elif spec.kind == "skewed_kl":
        m = spec.beta * q + (1 - spec.beta) * p
        entry = q * (q / m).log()
        positive = entry + m - q
    else:
        m = spec.beta * q + (1 - spec.beta) * p
        entry = positive = spec.beta * q * (q / m).log() + (1 - spec.beta) * p * (p / m).log()
    total, count = entry.sum(-1), torch.zeros_like(entry[:, 0])
    loss = total
    if spec.clip is not None and spec.clip_mode == "entry":
        loss, count = entry.clamp(max=spec.clip).sum(-1), (entry > spec.clip).sum(-1)
    elif spec.clip is not None and spec.clip_mode == "token":
        loss, count = total.clamp(max=spec.clip), total > spec.clip
    elif spec.clip is not None:
        loss, count = (spec.clip * (1 + positive / spec.clip).log()).sum(-1), (positive > spec.clip).sum(-1)
    return {
        "loss": loss,
        "unclipped": total.detach(),
        "clip_count": count.to(total.dtype),
        "entropy_student": -(p * log_p).sum(-1).detach(),
        "entropy_teacher": -(q * log_q).sum(-1),
        "agree": (student.argmax(-1) == teacher.argmax(-1)).to(total.dtype),
    }


def reference_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities of the sampled tokens at temperature 1."""
    return torch.log_softmax(logits.detach(), -1).gather(1, token_ids[:, None])[:, 0]


def reference_sampled_token(student: Tensor, teacher: Tensor, loss: SampledToken, tokens: Tokens) -> dict[str, Tensor]:
    """The loss of sampled tokens for logits [n, v] without padding; differentiable in ``student``."""
    assert tokens.ids is not None
    log_p, log_q = (torch.log_softmax(x / loss.temperature, -1) for x in (student, teacher))
    logprobs, teacher_logprobs = (x.gather(1, tokens.ids[:, None])[:, 0] for x in (log_p, log_q))
    advantages = (teacher_logprobs - logprobs).detach() if loss.needs_teacher else tokens.advantages
    assert advantages is not None
    unit_logprobs = reference_logprobs(student, tokens.ids)
    if loss.importance_cap is not None:
        assert tokens.rollout_logprobs is not None
        advantages = advantages * (unit_logprobs - tokens.rollout_logprobs).exp().clamp(max=loss.importance_cap)
    return {
        "loss": -advantages * logprobs,
        "entropy_student": -(log_p.exp() * log_p).sum(-1).detach(),
        "student_logprobs": unit_logprobs,
    }
