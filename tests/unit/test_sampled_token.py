"""The loss of sampled tokens, on one rank: against autograd in float64, in low precision, at the edges."""

import pytest
import torch
from torch import Tensor

from megatron_opsd.objective import SampledToken, Tokens, linear_loss
from megatron_opsd.objective.reference import reference_sampled_token
from tests.unit.test_objective_linear import PADDED, VOCAB, N, inputs
from tests.unit.test_objective_reference import SAMPLED_TOKEN

IDS = torch.arange(N) * 2


def measure(loss: SampledToken, tensors: list[Tensor], ids: Tensor = IDS, chunk_size: int = 5):
    hidden, head, teacher_hidden, teacher_head, weights = tensors
    tokens = Tokens(weights, ids, torch.linspace(-2, 3, N).to(weights), torch.linspace(-9, 0, N).to(weights))
    teacher = (teacher_hidden, teacher_head) if loss.needs_teacher else None
    return linear_loss(
        loss, hidden, head, tokens, teacher, vocab_size=VOCAB, tp_group=None, chunk_size=chunk_size
    ), tokens


@pytest.mark.parametrize("loss", SAMPLED_TOKEN, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_equals_autograd(loss: SampledToken, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    with torch.no_grad():
        tensors[1][VOCAB:] = tensors[3][VOCAB:] = torch.nan  # padding is never read
    (total, out), tokens = measure(loss, tensors)
    logits = [(exact[i] @ exact[i + 1][:VOCAB].t()) for i in (0, 2)]
    if dtype is torch.bfloat16:  # the product is made in bf16
        logits = [x + (x.bfloat16() - x).detach() for x in logits]
    wide = Tokens(*(None if x is None or x.dtype == torch.long else x.double() for x in tokens))
    expected = reference_sampled_token(logits[0], logits[1], loss, wide._replace(ids=tokens.ids))
    scale = {"rtol": tolerance, "atol": tolerance * 10}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name).double(), value.detach(), **scale)
    actual = torch.autograd.grad(3 * total, tensors[:2])
    wanted = torch.autograd.grad(3 * (exact[4] * expected["loss"]).sum(), exact[:2])
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= tolerance * other.norm()
    assert not actual[1][VOCAB:].any()


def test_a_weight_of_zero_silences_a_token_whatever_it_is() -> None:
    """An id outside the vocabulary has no log-prob, and a logit of -inf an infinite loss."""
    tensors = inputs()
    tensors[4] = torch.zeros(N, dtype=torch.float64)
    ids = IDS.clone()
    ids[0], ids[1] = PADDED, -1
    for loss in SAMPLED_TOKEN:
        (total, out), _ = measure(loss, tensors, ids)
        assert total == 0
        assert out.loss[:2].isnan().all()
        assert not any(grad.any() for grad in torch.autograd.grad(total, tensors[:2]))


def test_chunks_change_nothing() -> None:
    for loss in SAMPLED_TOKEN:
        tensors = inputs()
        grads = [torch.autograd.grad(measure(loss, tensors, chunk_size=size)[0][0], tensors[:2]) for size in (1, 99)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_without_advantages_it_is_the_log_likelihood() -> None:
    hidden, head, _, _, weights = inputs()
    total, out = linear_loss(SampledToken(), hidden, head, Tokens(weights, IDS), None, vocab_size=VOCAB, tp_group=None)
    assert torch.equal(out.loss, -out.student_logprobs)
    assert total == (weights * out.loss).sum()


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("advantage", "mine"), ("importance_cap", -1.0)])
def test_values_outside_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .* not {value!r}$"):
        SampledToken(**{field: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_advantages_stay_precise_where_the_models_are_close(distance: float) -> None:
    tensors = [x.detach() for x in inputs(torch.float32)]
    noise = torch.Generator().manual_seed(3)
    tensors[2], tensors[3] = tensors[0], tensors[1] + distance * torch.randn(tensors[1].shape, generator=noise)
    loss = SampledToken(1.3, "teacher")
    (_, out), tokens = measure(loss, tensors)
    logits = [tensors[i] @ tensors[i + 1][:VOCAB].t() for i in (0, 2)]  # in float32, as the loss sees them
    wanted = reference_sampled_token(logits[0].double(), logits[1].double(), loss, tokens)["loss"]
    assert (out.loss - wanted).norm() <= 2e-8 / distance * wanted.norm()


def test_what_does_not_fit_the_loss_is_refused() -> None:
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    tokens, teacher = Tokens(weights, IDS), (teacher_hidden, teacher_head)
    for loss, given, message in (
        (SampledToken(1.0, "given"), teacher, "no use for a teacher"),
        (SampledToken(1.0, "teacher"), None, "needs a teacher"),
        (SampledToken(importance_cap=2.0), None, "rollout_logprobs"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_loss(loss, hidden, head, tokens, given, vocab_size=VOCAB, tp_group=None)
