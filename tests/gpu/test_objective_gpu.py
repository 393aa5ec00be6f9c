"""The objective on a real GPU: the Triton backend at a real vocabulary, and the products of linear_divergence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opsd.objective import (
    Divergence,
    SampledToken,
    Tokens,
    backend_torch,
    linear_divergence,
    linear_loss,
    vocab_parallel_divergence,
)
from tests.unit.test_objective_reference import SAMPLED_TOKEN, SPECS, name_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

N, VOCAB, PADDED = 64, 151_669, 151_936  # Qwen3's: the last tile is masked, rows begin at wide loads' boundaries
# As in tests/unit/test_objective.py: relative errors of F⁺ and of the gradient.
ALLOWED = {torch.float64: (1e-11, 1e-11), torch.float32: (3e-6, 1e-6), torch.bfloat16: (5e-6, 3e-3)}


def logits_pair(dtype: torch.dtype, distance: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(7)
    student, noise = (
        2 * torch.randn(N, PADDED, generator=generator, device="cuda", dtype=torch.float64) for _ in range(2)
    )
    return student.to(dtype).requires_grad_(), (student + distance * noise).to(dtype)


def run(student: Tensor, teacher: Tensor, spec: Divergence, **options: Any) -> tuple[Any, Tensor]:
    ids = torch.arange(N, device="cuda") * 2000
    out = vocab_parallel_divergence(student, teacher, spec, vocab_size=VOCAB, tp_group=None, token_ids=ids, **options)
    weights = torch.linspace(-1, 2, N, device="cuda", dtype=out.loss.dtype)
    (gradient,) = torch.autograd.grad((weights * out.loss).sum(), student)
    return out, gradient


def exact(student: Tensor, teacher: Tensor, spec: Divergence) -> tuple[Any, Tensor]:
    """By the torch backend in float64, on the same device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Divergence, "_backend", lambda self, logits: backend_torch)
        return run(student.detach().double().requires_grad_(), teacher.double(), spec)


def assert_close(actual: tuple[Any, Tensor], expected: tuple[Any, Tensor], dtype: torch.dtype) -> None:
    (out, gradient), (wanted, wanted_gradient) = actual, expected
    divergence_error, gradient_error = ALLOWED[dtype]
    torch.testing.assert_close(out.unclipped.double(), wanted.unclipped, rtol=divergence_error, atol=0)
    # An entry clip breaks the zero sum, so its loss feels the normalizers' error in first order.
    torch.testing.assert_close(out.loss.double(), wanted.loss, rtol=divergence_error, atol=1e-6)
    for name in ("entropy_student", "entropy_teacher", "student_logprobs", "teacher_logprobs"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(wanted, name), rtol=divergence_error, atol=1e-6)
    assert torch.equal(out.agree.double(), wanted.agree)
    assert (gradient.double() - wanted_gradient).norm() <= gradient_error * wanted_gradient.norm()
    assert torch.count_nonzero(gradient[:, VOCAB:]) == 0


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("dtype", list(ALLOWED), ids=str)
def test_equals_the_torch_backend(spec: Divergence, dtype: torch.dtype) -> None:
    student, teacher = logits_pair(dtype, 0.3)
    expected = exact(student, teacher, spec)
    assert_close(run(student, teacher, spec), expected, dtype)
    assert_close(run(student.detach().clone().requires_grad_(), teacher, spec, inplace=True), expected, dtype)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_close_and_identical_models(kind: Any) -> None:
    spec = Divergence(kind=kind, temperature=1.1)
    student, teacher = logits_pair(torch.float32, 1e-4)
    assert_close(run(student, teacher, spec), exact(student, teacher, spec), torch.float32)
    for dtype in ALLOWED:
        student, _ = logits_pair(dtype, 0)
        out, gradient = run(student, student.detach(), spec)
        assert torch.count_nonzero(torch.stack([out.loss, out.unclipped])) == 0
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("loss", SAMPLED_TOKEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampled_tokens(loss: SampledToken, dtype: torch.dtype) -> None:
    """Against the same in float64 on the CPU. Hidden states and heads are small, the vocabulary is real."""
    generator = torch.Generator().manual_seed(11)
    shapes = [(N, 64), (PADDED, 64)] * 2
    tensors = [torch.randn(shape, generator=generator).to(dtype) / 4 for shape in shapes]
    tokens = Tokens(
        *(torch.linspace(-1, 2, N), torch.arange(N) * 2000, torch.linspace(-2, 3, N), torch.full((N,), -9.0))
    )

    def on(device: str, to: torch.dtype) -> list[Tensor]:
        hidden, head, *teacher = (x.to(device, to) for x in tensors)
        hidden.requires_grad_()
        head.requires_grad_()
        given = Tokens(
            *(
                x.to(device) if x.dtype == torch.long else x.to(device, torch.promote_types(to, torch.float32))
                for x in tokens
            )
        )
        sides = (teacher[0], teacher[1]) if loss.needs_teacher else None
        total, out = linear_loss(loss, hidden, head, given, sides, vocab_size=VOCAB, tp_group=None, chunk_size=24)
        return [out.loss, *torch.autograd.grad(total, (hidden, head))]

    for actual, wanted in zip(on("cuda", dtype), on("cpu", torch.float64), strict=True):
        tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
        assert (actual.double().cpu() - wanted).norm() <= tolerance * wanted.norm()


def test_more_than_two_to_the_31_entries() -> None:
    """Rows without an alignment of their own, of which the last begins beyond 32 bits; 9 GiB of both sides' logits."""
    n, width = 14_200, VOCAB
    student = torch.empty(n, width, dtype=torch.bfloat16, device="cuda").normal_()
    teacher = torch.empty_like(student).normal_()
    rows = torch.tensor([0, n - 1], device="cuda")
    few = student[rows].clone().requires_grad_()
    expected = vocab_parallel_divergence(few, teacher[rows], Divergence(), vocab_size=width, tp_group=None)
    (wanted,) = torch.autograd.grad(expected.loss.sum(), few)
    student.requires_grad_()
    out = vocab_parallel_divergence(student, teacher, Divergence(), vocab_size=width, tp_group=None, inplace=True)
    torch.testing.assert_close(out.loss[rows], expected.loss, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(out.loss.sum(), student)
    torch.testing.assert_close(gradient[rows], wanted, rtol=2**-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_divergence(dtype: torch.dtype) -> None:
    """Half-precision products come out in float32, so the loss is that of the inputs, not of rounded logits."""
    generator = torch.Generator("cuda").manual_seed(3)
    hidden, teacher_hidden = (torch.randn(N, 256, generator=generator, device="cuda") for _ in range(2))
    head, teacher_head = (torch.randn(PADDED, 256, generator=generator, device="cuda") / 8 for _ in range(2))
    inputs = [x.to(dtype) for x in (hidden, head, hidden + 0.1 * teacher_hidden, head + 0.1 * teacher_head)]
    spec = Divergence(kind="jsd", clip=0.05, clip_mode="saturate", temperature=1.7)
    results = []
    for tensors in (inputs, [x.double() for x in inputs]):
        hidden, head = (x.detach().requires_grad_() for x in tensors[:2])
        weights = torch.linspace(-1, 2, N, device="cuda", dtype=torch.promote_types(torch.float32, hidden.dtype))
        loss, out = linear_divergence(
            hidden, head, tensors[2], tensors[3], weights, spec, vocab_size=VOCAB, tp_group=None, chunk_size=40
        )
        results.append((out.unclipped.double(), *(g.double() for g in torch.autograd.grad(loss, (hidden, head)))))
    (value, *gradients), (wanted, *wanted_gradients) = results
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=0)  # float32 products may be TF32's or split sums
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-2 * expected.norm()
