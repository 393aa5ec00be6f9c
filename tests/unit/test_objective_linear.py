"""The divergence from hidden states and LM heads, on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opsd.objective import Divergence, linear_divergence, vocab_parallel_divergence
from megatron_opsd.objective.reference import reference, reference_logprobs
from tests.unit.test_objective_reference import SPECS, name_of

N, WIDTH, VOCAB, PADDED = 13, 6, 37, 40
each_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)


def inputs(dtype: torch.dtype = torch.float64, n: int = N) -> list[Tensor]:
    """Student's and teacher's hidden states and head, and token weights that differ."""
    generator = torch.Generator().manual_seed(11)
    shapes = [(n, WIDTH), (PADDED, WIDTH)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return [*tensors, torch.linspace(-1, 2, n, dtype=wide)]


def diverge(tensors: list[Tensor], spec: Divergence, **options: Any):
    return linear_divergence(*tensors, spec, vocab_size=VOCAB, tp_group=None, **options)


@each_spec
def test_equals_the_textbook(spec: Divergence) -> None:
    tensors = inputs()
    hidden, head, teacher_hidden, teacher_head, weights = tensors
    token_ids = torch.arange(N) * 2
    with torch.no_grad():
        head[VOCAB:] = teacher_head[VOCAB:] = torch.nan  # padding is never read
    student, teacher = hidden @ head[:VOCAB].t(), teacher_hidden @ teacher_head[:VOCAB].t()
    expected = reference(student, teacher, spec)
    expected_grads = torch.autograd.grad(3 * (weights * expected["loss"]).sum(), (hidden, head))
    for chunk_size in (1, 5, 2048):
        loss, out = diverge(tensors, spec, token_ids=token_ids, chunk_size=chunk_size)
        torch.testing.assert_close(loss, (weights * expected["loss"]).sum(), rtol=0, atol=1e-11)
        for name, value in expected.items():
            torch.testing.assert_close(
                getattr(out, name), value, rtol=1e-11, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}"
            )
        torch.testing.assert_close(out.teacher_logprobs, reference_logprobs(teacher, token_ids), rtol=0, atol=1e-11)
        assert not any(value.requires_grad for value in out)
        for actual, wanted in zip(torch.autograd.grad(3 * loss, (hidden, head)), expected_grads, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equals_the_divergence_of_the_same_logits(dtype: torch.dtype) -> None:
    """In low precision too: the logits are the plain product, and all after them is float32."""
    tensors = inputs(dtype)
    hidden, head, teacher_hidden, teacher_head, weights = tensors
    spec = Divergence(kind="reverse_kl", clip=0.05, temperature=1.1)
    student, teacher = hidden @ head.t(), teacher_hidden @ teacher_head.t()
    expected = vocab_parallel_divergence(student, teacher, spec, vocab_size=VOCAB, tp_group=None)
    loss, out = diverge(tensors, spec)
    assert loss.dtype == out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss)
    grads = torch.autograd.grad(loss, (hidden, head))
    wanted = torch.autograd.grad((weights * expected.loss).sum(), (hidden, head))
    for actual, exact in zip(grads, wanted, strict=True):
        assert actual.dtype == dtype
        assert (actual - exact).float().norm() <= (1e-2 if dtype is torch.bfloat16 else 1e-6) * exact.float().norm()


def test_head_gradient_is_summed_in_float32() -> None:
    tensors = inputs(torch.bfloat16, n=1000)
    tensors[4] = torch.ones(1000)
    (at_once,) = torch.autograd.grad(diverge(tensors, Divergence())[0], tensors[1])
    (one_by_one,) = torch.autograd.grad(diverge(tensors, Divergence(), chunk_size=1)[0], tensors[1])
    assert (at_once - one_by_one).float().norm() < 4e-3 * at_once.float().norm()


def test_a_second_backward_is_refused() -> None:
    tensors = inputs()
    loss, _ = diverge(tensors, Divergence())
    torch.autograd.grad(loss, tensors[:2], retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        torch.autograd.grad(loss, tensors[:2])


@each_spec
def test_identical_models_are_exactly_zero_apart(spec: Divergence) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        hidden, head, *_, weights = inputs(dtype)
        loss, out = diverge([hidden, head, hidden.detach(), head, weights], spec, chunk_size=5)
        assert loss == 0
        assert torch.count_nonzero(out.loss) == 0
        assert all(torch.count_nonzero(grad) == 0 for grad in torch.autograd.grad(loss, (hidden, head)))


def test_shared_head_receives_the_students_gradient_only() -> None:
    hidden, head, teacher_hidden, _, weights = inputs()
    loss, _ = diverge([hidden, head, teacher_hidden, head, weights], Divergence())
    expected = reference(hidden @ head[:VOCAB].t(), (teacher_hidden @ head[:VOCAB].t()).detach(), Divergence())["loss"]
    (actual,) = torch.autograd.grad(loss, head)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), head)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)
    assert torch.count_nonzero(actual[VOCAB:]) == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_gradient_joins_main_grad(tied: bool, dtype: torch.dtype) -> None:
    """What Megatron's data parallel wrapper expects of its own linear layers."""
    tensors = inputs(dtype)
    head: Any = tensors[1]
    (expected,) = torch.autograd.grad(diverge(tensors, Divergence())[0], head)
    head.main_grad = torch.ones(head.shape)
    head.grad_added_to_main_grad = False
    head.zero_out_wgrad = tied
    for times in (1, 2):
        loss, _ = diverge(tensors, Divergence())
        (0.5 * loss).backward()
        tolerance = 2**-8 if dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(head.main_grad - 1, 0.5 * times * expected.float(), rtol=tolerance, atol=1e-5)
        assert head.grad_added_to_main_grad is True
        assert head.grad.shape == head.shape
        if tied:
            assert torch.count_nonzero(head.grad) == 0
        head.grad_added_to_main_grad = False


def test_without_the_flag_main_grad_is_left_alone() -> None:
    tensors = inputs()
    head: Any = tensors[1]
    head.main_grad = torch.zeros(head.shape)
    diverge(tensors, Divergence())[0].backward()
    assert torch.count_nonzero(head.main_grad) == 0
    assert torch.count_nonzero(head.grad) > 0


def test_evaluation_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs()
    head: Any = tensors[1]
    head.main_grad, head.grad_added_to_main_grad = torch.zeros(head.shape), False
    with_grad, _ = diverge(tensors, Divergence())
    monkeypatch.setattr(Divergence, "write_gradient", lambda *_: pytest.fail("made a gradient"))
    with torch.no_grad():
        loss, _ = diverge(tensors, Divergence())
    frozen, _ = diverge([tensor.detach() for tensor in tensors], Divergence())
    assert loss == frozen == with_grad
    assert not loss.requires_grad
    assert not frozen.requires_grad
    assert torch.count_nonzero(head.main_grad) == 0
    assert head.grad_added_to_main_grad is False


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_may_be_frozen(frozen: int) -> None:
    tensors = inputs()
    everything = torch.autograd.grad(diverge(tensors, Divergence())[0], tensors[:2])
    tensors[frozen] = tensors[frozen].detach()
    (grad,) = torch.autograd.grad(diverge(tensors, Divergence())[0], tensors[1 - frozen])
    assert torch.equal(grad, everything[1 - frozen])


def test_no_tokens() -> None:
    tensors = inputs(n=0)
    loss, out = diverge(tensors, Divergence(), token_ids=torch.zeros(0, dtype=torch.long))
    assert loss == 0
    assert all(value.shape == (0,) for value in out)
    hidden_grad, head_grad = torch.autograd.grad(loss, tensors[:2])
    assert hidden_grad.shape == (0, WIDTH)
    assert torch.count_nonzero(head_grad) == 0


def test_a_token_of_weight_zero_adds_nothing() -> None:
    hidden, head, teacher_hidden, teacher_head, weights = inputs(torch.float32)
    spec = Divergence()
    rest, _ = diverge([hidden[1:], head, teacher_hidden[1:], teacher_head, weights[1:]], spec)
    expected = torch.autograd.grad(rest, (hidden, head))
    teacher_hidden[0] = torch.nan
    weights[0] = 0
    loss, out = diverge([hidden, head, teacher_hidden, teacher_head, weights], spec)
    assert out.loss[0].isnan()
    torch.testing.assert_close(loss, rest)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    for tensors, message in (
        ([hidden, head, teacher_hidden[1:], teacher_head, weights], "hidden states must all be"),
        ([hidden, head, teacher_hidden, teacher_head[1:], weights], "heads differ in rows: 40 and 39"),
        ([hidden, head, teacher_hidden, teacher_head, weights[1:]], "token_weights must have one value"),
    ):
        with pytest.raises(ValueError, match=message):
            diverge(tensors, Divergence())
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        diverge([hidden, head, teacher_hidden, teacher_head, weights], Divergence(), chunk_size=0)
