"""The divergence from logits, on one rank: against the textbook in float64, and its precision in float32 and bf16."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_opsd.objective import Divergence, backend_torch, vocab_parallel_divergence
from megatron_opsd.objective.kinds import SERIES_BELOW
from megatron_opsd.objective.reference import reference, reference_logprobs
from tests.unit.test_objective_reference import KINDS, SPECS, name_of

N, VOCAB, PADDED = 13, 37, 40
each_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
each_kind = pytest.mark.parametrize("kind", KINDS)


def logits_pair(dtype: torch.dtype = torch.float64, n: int = N, vocab: int = PADDED) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits, from token to token further apart."""
    generator = torch.Generator().manual_seed(7)
    student, noise = (2 * torch.randn(n, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = student + torch.linspace(0.1, 1.5, n, dtype=torch.float64)[:, None] * noise
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def diverge(student: Tensor, teacher: Tensor, spec: Divergence, vocab_size: int | None = None, **options: Any):
    vocab_size = student.shape[1] if vocab_size is None else vocab_size
    return vocab_parallel_divergence(student, teacher, spec, vocab_size=vocab_size, tp_group=None, **options)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    """Gradient of a sum with a different weight for each token."""
    weights = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype)
    (grad,) = torch.autograd.grad((weights * loss).sum(), student, retain_graph=True)
    return grad


@each_spec
def test_equals_the_textbook(spec: Divergence) -> None:
    student, teacher = logits_pair()
    token_ids = torch.arange(N) * 2
    out = diverge(student, teacher, spec, VOCAB, token_ids=token_ids)
    expected = reference(student[:, :VOCAB], teacher[:, :VOCAB], spec)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-11, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}")
    torch.testing.assert_close(gradient(out.loss, student), gradient(expected["loss"], student), rtol=0, atol=1e-11)
    for logprobs, logits in ((out.student_logprobs, student), (out.teacher_logprobs, teacher)):
        torch.testing.assert_close(logprobs, reference_logprobs(logits[:, :VOCAB], token_ids), rtol=0, atol=1e-11)
    assert [value.requires_grad for value in out] == [True] + [False] * 7
    if spec.clip is not None:
        assert 0 < out.clip_count.sum() < (N if spec.clip_mode == "token" else N * VOCAB), "the clip must be at work"


@each_spec
def test_gradient_equals_finite_differences(spec: Divergence) -> None:
    student, teacher = logits_pair(n=3, vocab=5)
    assert torch.autograd.gradcheck(lambda x: diverge(x, teacher, spec).loss, student)


@each_spec
def test_identical_models_are_exactly_zero_apart(spec: Divergence) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        student, _ = logits_pair(dtype)
        out = diverge(student, student, spec, VOCAB)
        assert torch.count_nonzero(gradient(out.loss, student)) == 0
        assert torch.count_nonzero(torch.stack([out.loss, out.unclipped, out.clip_count])) == 0
        assert out.agree.eq(1).all()


# Relative errors allowed: of each token's divergence and, in the L2 norm, of the gradient. A bf16 gradient is rounded
# to 2⁻⁹ when it is stored. At a distance of 1e-4 the float64 textbook itself is good to 1e-6 only.
PRECISION = {torch.float32: (3e-6, 1e-6), torch.bfloat16: (5e-6, 3e-3)}


@each_kind
@pytest.mark.parametrize("clip_mode", ["none", "entry", "saturate"])
@pytest.mark.parametrize("distance", [None, 1e-2, 1e-4], ids=["far", "near", "nearest"])
@pytest.mark.parametrize("dtype", list(PRECISION), ids=str)
def test_precision(kind: Any, clip_mode: Any, distance: float | None, dtype: torch.dtype) -> None:
    clip = None if clip_mode == "none" else 1e-6 if distance == 1e-4 else 0.01
    spec = Divergence(kind=kind, temperature=1.1, clip=clip, clip_mode="entry" if clip is None else clip_mode)
    student, teacher = logits_pair(dtype, n=8, vocab=4000)
    noise = torch.randn(student.shape, generator=torch.Generator().manual_seed(8))
    if distance is not None and dtype is torch.float32:
        teacher = student.detach() + distance * noise
    elif distance is not None:  # bf16 knows no such steps: move a few logits by a unit or two in their last place
        teacher = torch.where(noise.abs() < 10 * distance, student.detach() * (1 + 2**-7), student.detach())
    out = diverge(student, teacher, spec)
    exact = student.detach().double().requires_grad_()
    expected = reference(exact, teacher.double(), spec)
    divergence_error, gradient_error = PRECISION[dtype]
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.unclipped.double(), expected["unclipped"], rtol=divergence_error, atol=0)
    actual_grad, expected_grad = gradient(out.loss, student), gradient(expected["loss"], exact)
    assert actual_grad.dtype == dtype
    assert (actual_grad - expected_grad).norm() <= gradient_error * expected_grad.norm()


@each_kind
def test_saturated_loss_is_never_negative_and_the_unclipped_neither(kind: Any) -> None:
    for scale in (1e-6, 1e-3, 1, 30):
        student, teacher = logits_pair(torch.float32)
        out = diverge(
            student, student.detach() + scale * teacher, Divergence(kind=kind, clip=0.05, clip_mode="saturate")
        )
        assert out.unclipped.min() >= 0
        assert out.loss.min() >= 0
        assert (out.loss <= out.unclipped * (1 + 1e-6)).all()


def test_the_papers_clip_can_go_negative_and_turn_the_gradient_around() -> None:
    student = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.99, 0.01]], dtype=torch.float64).log()
    slopes = {}
    for mode in ("entry", "saturate"):
        out = diverge(student, teacher, Divergence(clip=0.05, clip_mode=mode))
        slopes[mode] = torch.autograd.grad(out.loss.sum(), student)[0][0, 0].item()
    assert slopes["entry"] == pytest.approx(0.004)
    assert slopes["saturate"] < 0
    assert diverge(student, teacher, Divergence(clip=0.02)).loss.item() < 0


@each_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("beta", [0.02, 0.5, 0.97])
def test_series_meets_the_formula(kind: Any, dtype: torch.dtype, tolerance: float, beta: float) -> None:
    """Around both ends of the range in which f⁺ passes from the one to the other."""
    size = torch.linspace(0.5, 2.5, 401, dtype=dtype) * SERIES_BELOW
    d = torch.cat([-size, size])
    p = torch.full_like(d, 0.1)
    value = Divergence(kind=kind, beta=beta).entry.forms(p, p * d.exp(), d).value
    x = np.asarray(d.numpy(), dtype=np.longdouble)  # 64 bits of mantissa: the formula itself is good enough
    p_exact = np.asarray(p.numpy(), dtype=np.longdouble)
    q_exact = p_exact * np.exp(x)
    m = beta * q_exact + (1 - beta) * p_exact
    exact = {
        "forward_kl": q_exact * (x + np.expm1(-x)),
        "reverse_kl": p_exact * (np.expm1(x) - x),
        "jsd": beta * q_exact * np.log(q_exact / m) + (1 - beta) * p_exact * np.log(p_exact / m),
        "skewed_kl": q_exact * np.log(q_exact / m) + m - q_exact,
    }[kind]
    assert value is not None
    np.testing.assert_allclose(value.numpy(), exact.astype(value.numpy().dtype), rtol=tolerance)


@each_spec
def test_entries_agree_with_the_table_at_every_distance(spec: Divergence) -> None:
    """f⁺ = f + shift and its slope, by autograd of the textbook's terms."""
    d = torch.cat([torch.logspace(-3, 1, 60, dtype=torch.float64), -torch.logspace(-3, 1, 60, dtype=torch.float64)])
    log_q = torch.full_like(d, -12.0)
    log_p = (log_q - d).requires_grad_()
    p, q = log_p.exp(), log_q.exp()
    m = spec.beta * q + (1 - spec.beta) * p
    raw, shift = {
        "forward_kl": (q * d, p - q),
        "reverse_kl": (p * (log_p - log_q), q - p),
        "jsd": (spec.beta * q * (q / m).log() + (1 - spec.beta) * p * (p / m).log(), 0 * p),
        "skewed_kl": (q * (q / m).log(), m - q),
    }[spec.kind]
    if spec.kind == "forward_kl":
        raw = q * (log_q - log_p)
    forms = spec.entry.forms(p.detach(), q, d)
    scale = {"rtol": 1e-8, "atol": 1e-18}
    torch.testing.assert_close(forms.raw, raw.detach(), **scale)
    torch.testing.assert_close(forms.value, (raw + shift).detach(), **scale)
    if spec.kind != "jsd":
        torch.testing.assert_close(forms.shift, shift.detach(), **scale)
    (dlogp,) = torch.autograd.grad((raw + shift).sum(), log_p, retain_graph=True)
    (shift_dlogp,) = torch.autograd.grad(shift.sum(), log_p)
    torch.testing.assert_close(forms.dlogp, dlogp, **scale)
    if spec.kind != "jsd":
        torch.testing.assert_close(forms.shift_dlogp, shift_dlogp, **scale)


@each_spec
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_padding_is_never_read(spec: Divergence, garbage: float) -> None:
    student, teacher = logits_pair()
    plain = diverge(student, teacher, spec, VOCAB)
    noisy, noisy_teacher = student.detach().clone(), teacher.clone()
    noisy[:, VOCAB:] = noisy_teacher[:, VOCAB:] = garbage
    out = diverge(noisy.requires_grad_(), noisy_teacher, spec, VOCAB)
    grad = gradient(out.loss, noisy)
    assert all(torch.equal(a, b) for a, b in zip(out[:6], plain[:6], strict=True))
    assert torch.equal(grad, gradient(plain.loss, student))
    assert torch.count_nonzero(grad[:, VOCAB:]) == 0


def limit(logits: Tensor) -> Tensor:
    """Minus infinity, as the textbook's float64 can bear it."""
    return logits.detach().double().clamp(min=-600)


@each_spec
def test_forbidden_tokens_contribute_their_limits(spec: Divergence) -> None:
    student, teacher = (x.detach().clone() for x in logits_pair())
    student[:, 3] = teacher[:, 3] = -torch.inf
    missing_in = teacher if spec.kind == "forward_kl" else student
    missing_in[:, 5] = -torch.inf
    if spec.kind == "jsd":
        teacher[:, 8] = -torch.inf
    student.requires_grad_()
    out = diverge(student, teacher, spec)
    limited = limit(student).requires_grad_()
    expected = reference(limited, limit(teacher), spec)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=0, atol=1e-11)
    torch.testing.assert_close(out.entropy_student, expected["entropy_student"], rtol=0, atol=1e-11)
    torch.testing.assert_close(gradient(out.loss, student), gradient(expected["loss"], limited), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_infinite_divergences(kind: Any) -> None:
    student, teacher = (x.detach().clone() for x in logits_pair())
    (student if kind == "forward_kl" else teacher)[0, 5] = -torch.inf
    student.requires_grad_()
    out = diverge(student, teacher, Divergence(kind=kind))
    assert out.unclipped[0] == torch.inf
    assert torch.isfinite(out.unclipped[1:]).all()
    for mode in ("entry", "token"):
        out = diverge(student, teacher, Divergence(kind=kind, clip=0.3, clip_mode=mode))
        assert torch.isfinite(out.loss).all()
        assert torch.isfinite(gradient(out.loss, student)).all()
    (grad,) = torch.autograd.grad(
        diverge(student, teacher, Divergence(kind=kind)).loss, student, (torch.arange(N) > 0).double()
    )
    assert torch.isfinite(grad).all(), "a token of weight zero must not spoil the gradient"


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits(spec: Divergence, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0, 3], [-1e4, 1e4, 0, 3], [1e4, 1e4, -1e4, -1e4], [0, 1, 2, 3]], dtype=dtype)
    teacher = student.flip(0)
    student.requires_grad_()
    out = diverge(student, teacher, spec, token_ids=torch.tensor([1, 1, 1, 1]))
    assert all(torch.isfinite(value).all() for value in out)
    assert torch.isfinite(gradient(out.loss, student)).all()
    bounded = {"jsd": 1.0, "skewed_kl": 1.3}  # the latter by -log beta
    assert out.unclipped.max() < bounded[spec.kind] if spec.kind in bounded else out.unclipped.max() > 1e3


@each_kind
def test_a_flat_and_a_sharp_side(kind: Any) -> None:
    """Sums of exponentials of 4000 and 1 side by side, and a probability too small for a normal number."""
    spec = Divergence(kind=kind)
    student, _ = logits_pair(torch.float32, n=2, vocab=4000)
    student = (student * 1e-3).detach().requires_grad_()
    teacher = student.detach().clone()
    teacher[:, 0] += 30
    teacher[0, 1] -= 72  # 3e-45 in float32
    out = diverge(student, teacher, spec)
    exact = student.detach().double().requires_grad_()
    expected = reference(exact, teacher.double(), spec)
    torch.testing.assert_close(out.loss.double(), expected["loss"], rtol=1e-6, atol=0)
    expected_grad = gradient(expected["loss"], exact)
    assert (gradient(out.loss, student) - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_layouts_and_no_tokens(dtype: torch.dtype) -> None:
    spec = Divergence(kind="jsd", clip=0.02)
    student, teacher = logits_pair(dtype)
    out = diverge(student, teacher, spec)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert {value.dtype for value in out[:6]} == {wide}
    upcast = diverge(student.detach().to(wide), teacher.to(wide), spec)
    assert all(torch.equal(a, b) for a, b in zip(out[:6], upcast[:6], strict=True))
    assert gradient(out.loss, student).dtype == dtype

    strided = student.detach().t().contiguous().t().requires_grad_()
    other = diverge(strided, teacher[:, ::1].t().contiguous().t(), spec)
    torch.testing.assert_close(other.loss, out.loss)
    torch.testing.assert_close(gradient(other.loss, strided), gradient(out.loss, student))

    nothing = student[:0].detach().requires_grad_()
    out = diverge(nothing, teacher[:0], spec, token_ids=torch.zeros(0, dtype=torch.long))
    assert all(value.shape == (0,) for value in out)
    assert torch.autograd.grad(out.loss.sum(), nothing)[0].shape == (0, PADDED)


@each_spec
@pytest.mark.parametrize("at_once", [5 * VOCAB, 10, 1])
def test_tiles_change_nothing(spec: Divergence, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits_pair()
    plain = diverge(student, teacher, spec, VOCAB)
    expected = gradient(plain.loss, student)
    monkeypatch.setattr(backend_torch, "ENTRIES_AT_ONCE", at_once)
    out = diverge(student, teacher, spec, VOCAB)
    torch.testing.assert_close(out[:6], plain[:6], rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient(out.loss, student), expected, rtol=0, atol=1e-14)


@each_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_in_place_the_gradient_takes_the_logits_memory(
    spec: Divergence, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head = torch.randn(N, 6, dtype=dtype, requires_grad=True), torch.randn(6, PADDED, dtype=dtype)
    _, teacher = logits_pair(dtype)
    expected = gradient(diverge(hidden @ head, teacher, spec, VOCAB).loss, hidden)
    for at_once in (5 * VOCAB, 10):
        monkeypatch.setattr(backend_torch, "ENTRIES_AT_ONCE", at_once)
        logits = hidden @ head
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        loss = diverge(logits, teacher, spec, VOCAB, inplace=True).loss
        torch.testing.assert_close(gradient(loss, hidden), expected)
        assert seen[0].data_ptr() == logits.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(loss, hidden)


def test_in_place_refuses_what_it_would_overwrite() -> None:
    student, _ = logits_pair()
    with pytest.raises(ValueError, match="both sides are one tensor"):
        diverge(student, student.detach(), Divergence(), inplace=True)


def test_ties_go_to_the_lowest_id_and_unknown_ids_are_nan() -> None:
    student = torch.tensor([[0.0, 2, 2], [2, 0, 2], [1, 2, 3]])
    teacher = torch.tensor([[0.0, 3, 1], [1, 0, 3], [5, 4, 3]])
    out = diverge(student, teacher, Divergence(), token_ids=torch.tensor([-1, 3, 0]))
    assert out.agree.tolist() == [1, 0, 0]
    assert out.student_logprobs.isnan().tolist() == [True, True, False]


def test_gradient_goes_to_the_student_only_and_teacher_may_be_the_same_tensor() -> None:
    student, teacher = logits_pair()
    teacher.requires_grad_()
    loss = diverge(student, teacher, Divergence()).loss.sum()
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None
    with torch.no_grad():
        assert not diverge(student, teacher, Divergence()).loss.requires_grad


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "kl"}, "kind must be one of forward_kl, reverse_kl, jsd"),
        ({"beta": 0.0}, "beta must lie strictly"),
        ({"beta": 1.0}, "beta must lie strictly"),
        ({"beta": math.nan}, "beta must lie strictly"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature must be positive"),
        ({"clip": 0.0}, "clip must be None or positive"),
        ({"clip": math.nan}, "clip must be None or positive"),
        ({"clip_mode": "hard"}, "clip_mode must be one of entry, token, saturate"),
    ],
)
def test_bad_specs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Divergence(**fields)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, teacher = logits_pair()
    with pytest.raises(ValueError, match="logits must both be"):
        diverge(student, teacher[1:], Divergence())
    with pytest.raises(ValueError, match="token_ids must have one value for each of 13 tokens"):
        diverge(student, teacher, Divergence(), token_ids=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="vocab_size 41 does not fit 1 shards of 40"):
        diverge(student, teacher, Divergence(), 41)
