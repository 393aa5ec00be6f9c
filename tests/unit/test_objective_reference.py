"""The objective as a textbook writes it, on whole logits with torch autograd: what the package is tested against."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_opsd.objective import Divergence

KINDS = ("forward_kl", "reverse_kl", "jsd")
CLIPS = ((None, "entry"), (0.05, "entry"), (0.05, "token"), (0.05, "saturate"))
SPECS = [
    Divergence(kind=kind, beta=0.3, temperature=temperature, clip=clip, clip_mode=mode)
    for kind, (clip, mode), temperature in product(KINDS, CLIPS, (1.0, 1.7))
]


def name_of(spec: Divergence) -> str:
    return f"{spec.kind}-{'none' if spec.clip is None else spec.clip_mode}-{spec.temperature}"


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


def test_the_papers_clip_turns_a_sharp_decision_around() -> None:
    student = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.99, 0.01]], dtype=torch.float64).log()
    expected = {None: 0.4 - 0.99, 0.05: 0.4 * 0.01}
    for clip, slope in expected.items():
        (grad,) = torch.autograd.grad(reference(student, teacher, Divergence(clip=clip))["loss"].sum(), student)
        assert grad[0, 0].item() == pytest.approx(slope)


def test_jensen_shannon_of_disjoint_distributions_is_the_entropy_of_beta() -> None:
    student = torch.tensor([[0.0, -200.0]], dtype=torch.float64)
    value = reference(student, student.flip(1), Divergence(kind="jsd", beta=0.3))["unclipped"]
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert value.item() == pytest.approx(entropy)
