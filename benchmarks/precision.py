"""Compares the objective's rounding errors with the textbook's: `python benchmarks/precision.py`, seconds on a CPU.

Prints the table of docs/numerics.md: the largest relative error over 16 tokens and all kinds. The reference is the
textbook in float64 on the same inputs. "Textbook" is log_softmax and autograd in float32.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from megatron_opsd.objective import Divergence, vocab_parallel_divergence

TOKENS, VOCAB, TEMPERATURE = 16, 32_000, 1.1
KINDS = ("forward_kl", "reverse_kl", "jsd")
DISTANCES = (None, 1e-2, 1e-4)


def textbook(student: Tensor, teacher: Tensor, spec: Divergence) -> Tensor:
    """F per token, in the logits' precision."""
    log_p, log_q = (torch.log_softmax(logits / spec.temperature, -1) for logits in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    if spec.kind == "forward_kl":
        entries = q * (log_q - log_p)
    elif spec.kind == "reverse_kl":
        entries = p * (log_p - log_q)
    else:
        log_m = (spec.beta * q + (1 - spec.beta) * p).log()
        entries = spec.beta * q * (log_q - log_m) + (1 - spec.beta) * p * (log_p - log_m)
    if spec.clip is not None:  # saturate, on the non-negative form
        shift = {"forward_kl": p - q, "reverse_kl": q - p, "jsd": torch.zeros_like(p)}[spec.kind]
        entries = spec.clip * torch.log1p((entries + shift) / spec.clip)
    return entries.sum(-1)


def value_and_gradient(function: Any, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    leaf = student.to(dtype).requires_grad_()
    value = function(leaf, teacher.to(dtype))
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def pair(dtype: torch.dtype, distance: float | None) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, the teacher's far away or about ``distance`` from the student's."""
    generator = torch.Generator().manual_seed(0)
    student, other, noise = (torch.randn(TOKENS, VOCAB, generator=generator) for _ in range(3))
    student = (3 * student).to(dtype)
    if distance is None:
        return student, (3 * other).to(dtype)
    if dtype is torch.float32:
        return student, student + distance * noise
    # bf16 has no steps that small: move a share of the logits by a unit or two in their last place instead
    return student, torch.where(noise.abs() < 10 * distance, student * (1 + 2**-7), student)


def errors(dtype: torch.dtype, distance: float | None) -> list[float]:
    """Largest relative error: of F⁺ and the textbook's F, and of the gradient (none, saturate) and the textbook's."""
    student, teacher = pair(dtype, distance)
    worst = [0.0] * 4
    for kind, clip in product(KINDS, (None, 0.01)):
        spec: Any = Divergence(kind=kind, temperature=TEMPERATURE, clip=clip, clip_mode="saturate")  # type: ignore[arg-type]

        def naive(s: Tensor, t: Tensor, spec: Divergence = spec) -> Tensor:
            return textbook(s, t, spec)

        def ours(s: Tensor, t: Tensor, spec: Divergence = spec) -> Tensor:
            return vocab_parallel_divergence(s, t, spec, vocab_size=VOCAB, tp_group=None).loss

        truth, true_gradient = value_and_gradient(naive, student, teacher, torch.float64)
        for i, (function, precision) in enumerate(((ours, dtype), (naive, torch.float32))):
            value, gradient = value_and_gradient(function, student, teacher, precision)
            value_error = ((value.double() - truth) / truth).abs().max()
            gradient_error = (gradient.double() - true_gradient).norm() / true_gradient.norm()
            if clip is None:
                worst[i] = max(worst[i], float(value_error))
            worst[2 + i] = max(worst[2 + i], float(gradient_error))
    return worst


def main() -> None:
    print("| logits | distance | F⁺ | textbook | gradient (L2), none / `saturate` | textbook |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype, distance in product((torch.float32, torch.bfloat16), DISTANCES):
        cells = (f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e") for error in errors(dtype, distance))
        away = "far" if distance is None else f"{distance:.0e}".replace("e-0", "e-")
        print(f"| {str(dtype).removeprefix('torch.')} | {away} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
