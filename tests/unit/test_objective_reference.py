"""What the reference says of the paper's own examples, and the objectives that the tests go through."""

import math
from itertools import product

import pytest
import torch

from megatron_opsd.objective import Divergence, SampledToken
from megatron_opsd.objective.reference import reference

KINDS = ("forward_kl", "reverse_kl", "jsd", "skewed_kl")
CLIPS = ((None, "entry"), (0.05, "entry"), (0.05, "token"), (0.05, "saturate"))
SPECS = [
    Divergence(kind=kind, beta=0.3, temperature=temperature, clip=clip, clip_mode=mode)
    for kind, (clip, mode), temperature in product(KINDS, CLIPS, (1.0, 1.7))
]

SAMPLED_TOKEN = [
    SampledToken(temperature, advantage, cap)
    for temperature, advantage, cap in product((1.0, 1.7), ("given", "teacher"), (None, 2.0))
]


def name_of(spec: Divergence) -> str:
    return f"{spec.kind}-{'none' if spec.clip is None else spec.clip_mode}-{spec.temperature}"


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
