"""The divergence over a vocabulary spread on 2 and 4 ranks: equal to the textbook on whole logits, gradients too."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.objective import (
    Divergence,
    SampledToken,
    Tokens,
    linear_divergence,
    linear_loss,
    vocab_parallel_divergence,
)
from megatron_opsd.objective.reference import reference, reference_logprobs, reference_sampled_token
from megatron_opsd.objective.vocab_shard import VocabShard
from tests.distributed.harness import run_distributed
from tests.unit.test_objective_reference import KINDS, SAMPLED_TOKEN, SPECS, name_of

N, WIDTH, PADDED = 13, 6, 40  # a vocabulary of 37 leaves the last rank some padding, one of 19 nothing else


def whole_inputs() -> list[Tensor]:
    """Hidden states and whole heads of both sides, weights and ids: the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(N, WIDTH), (PADDED, WIDTH)] * 2
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    teacher_hidden = hidden + torch.linspace(0, 1, N, dtype=torch.float64)[:, None] * teacher_hidden
    teacher_head = head + 0.3 * teacher_head
    return [hidden, head, teacher_hidden, teacher_head, torch.linspace(-1, 2, N, dtype=torch.float64)]


def my_share(tensor: Tensor, dim: int) -> Tensor:
    """This rank's part of a vocabulary dimension."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].detach().clone()


def counting(reductions: list[object]) -> Callable[[], None]:
    """Record every all-reduce; call the result to undo."""
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        reductions.append(kwargs.get("op"))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    return lambda: setattr(dist, "all_reduce", original)


def check_logits(spec: Divergence, vocab: int) -> None:
    hidden, head, teacher_hidden, teacher_head, weights = whole_inputs()
    student, teacher = (hidden @ head.t()).requires_grad_(), teacher_hidden @ teacher_head.t()
    ids = torch.arange(N) % vocab
    expected = reference(student[:, :vocab], teacher[:, :vocab], spec)
    (expected_grad,) = torch.autograd.grad((weights * expected["loss"]).sum(), student)

    student_poisoned, teacher_poisoned = student.detach().clone(), teacher.clone()
    student_poisoned[:, vocab:], teacher_poisoned[:, vocab:] = torch.nan, torch.inf
    mine = my_share(student_poisoned, 1).requires_grad_()
    reductions: list[object] = []
    undo = counting(reductions)
    out = vocab_parallel_divergence(
        mine, my_share(teacher_poisoned, 1), spec, vocab_size=vocab, tp_group=dist.group.WORLD, token_ids=ids
    )
    forward = len(reductions)
    (grad,) = torch.autograd.grad((weights * out.loss).sum(), mine)
    undo()
    assert (forward, len(reductions)) == (3, 3), "three all-reduces forward, none backward"
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=0, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}")
    torch.testing.assert_close(grad, my_share(expected_grad, 1), rtol=0, atol=1e-11)
    logprobs = (out.student_logprobs, out.teacher_logprobs)
    wanted = tuple(reference_logprobs(x[:, :vocab], ids) for x in (student, teacher))
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-11)


def check_linear(spec: Divergence, vocab: int) -> None:
    hidden, head, teacher_hidden, teacher_head, weights = whole_inputs()
    hidden.requires_grad_()
    head.requires_grad_()
    logits = hidden @ head[:vocab].t(), teacher_hidden @ teacher_head[:vocab].t()
    expected = (weights * reference(*logits, spec)["loss"]).sum()
    hidden_grad, head_grad = torch.autograd.grad(3 * expected, (hidden, head))

    mine = my_share(head, 0).requires_grad_()
    reductions: list[object] = []
    undo = counting(reductions)
    loss, _ = linear_divergence(
        hidden, mine, teacher_hidden, my_share(teacher_head, 0), weights, spec,
        vocab_size=vocab, tp_group=dist.group.WORLD, chunk_size=5,
    )  # fmt: skip
    partial, mine_grad = torch.autograd.grad(3 * loss, (hidden, mine))
    undo()
    assert len(reductions) == 3 * 3, "three all-reduces a chunk, none backward"
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(mine_grad, my_share(head_grad, 0), rtol=0, atol=1e-11)
    dist.all_reduce(partial)  # a rank's part: the sum is the caller's
    torch.testing.assert_close(partial, hidden_grad, rtol=0, atol=1e-11)


def check_identical(kind: Any) -> None:
    """Exactly zero, although a ring adds each element in an order of its own."""
    student = torch.randn(101, 40, generator=torch.Generator().manual_seed(5))
    for dtype in (torch.float32, torch.bfloat16):
        mine = my_share(student.to(dtype), 1).requires_grad_()
        spec = Divergence(kind=kind, temperature=1.1)
        out = vocab_parallel_divergence(mine, mine.detach(), spec, vocab_size=37, tp_group=dist.group.WORLD)
        (grad,) = torch.autograd.grad((out.loss * torch.arange(101)).sum(), mine)
        assert torch.count_nonzero(out.loss) == torch.count_nonzero(grad) == 0
        tokens = Tokens(torch.ones(101), torch.arange(101) % 37)
        shard = VocabShard.of(mine.shape[1], 37, dist.group.WORLD)
        real = mine.detach()[:, : shard.width]
        values, _ = SampledToken(1.1, "teacher").measure(real, real, tokens, shard, 37)
        assert torch.count_nonzero(values.loss) == 0


def check_ties() -> None:
    """Where several ids are first, one that both sides put first on one rank is enough, and counts once."""
    generator = torch.Generator().manual_seed(9)
    student, teacher = (torch.randint(0, 3, (500, 12), generator=generator).float() for _ in range(2))
    out = vocab_parallel_divergence(
        my_share(student, 1), my_share(teacher, 1), Divergence(), vocab_size=11, tp_group=dist.group.WORLD
    )
    first = [logits[:, :11] == logits[:, :11].amax(-1, keepdim=True) for logits in (student, teacher)]
    possible = (first[0] & first[1]).any(-1)
    assert out.agree.unique().tolist() == [0, 1]
    assert not out.agree[~possible].any()
    lowest = [side.int().argmax(-1) for side in first]
    assert out.agree[lowest[0] == lowest[1]].all()


def check_sampled_token(loss: SampledToken, vocab: int) -> None:
    """Loss and gradients of hidden states and head, against autograd on whole logits."""
    hidden, head, teacher_hidden, teacher_head, weights = whole_inputs()
    hidden.requires_grad_()
    head.requires_grad_()
    ids = torch.arange(N) * 5 % vocab
    tokens = Tokens(weights, ids, torch.linspace(-2, 3, N).double(), torch.linspace(-9, 0, N).double())
    logits, teacher_logits = hidden @ head[:vocab].t(), teacher_hidden @ teacher_head[:vocab].t()
    expected = reference_sampled_token(logits, teacher_logits, loss, tokens)
    hidden_grad, head_grad = torch.autograd.grad(3 * (weights * expected["loss"]).sum(), (hidden, head))

    mine = my_share(head, 0).requires_grad_()
    teacher = (teacher_hidden, my_share(teacher_head, 0)) if loss.needs_teacher else None
    reductions: list[object] = []
    undo = counting(reductions)
    total, out = linear_loss(
        loss, hidden, mine, tokens, teacher, vocab_size=vocab, tp_group=dist.group.WORLD, chunk_size=5
    )
    partial, mine_grad = torch.autograd.grad(3 * total, (hidden, mine))
    undo()
    assert len(reductions) == 3 * (3 if loss.needs_teacher else 2), "all-reduces a chunk, none backward"
    torch.testing.assert_close(total, (weights * expected["loss"]).sum(), rtol=0, atol=1e-11)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(mine_grad, my_share(head_grad, 0), rtol=0, atol=1e-11)
    dist.all_reduce(partial)  # a rank's part: the sum is the caller's
    torch.testing.assert_close(partial, hidden_grad, rtol=0, atol=1e-11)


def check_lone_group() -> None:
    """A group of one talks to nobody; no tokens are no trouble."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    hidden, head, teacher_hidden, teacher_head, _ = whole_inputs()
    logits = hidden @ head.t(), teacher_hidden @ teacher_head.t()
    reductions: list[object] = []
    undo = counting(reductions)
    alone = vocab_parallel_divergence(*logits, Divergence(), vocab_size=37, tp_group=groups[dist.get_rank()])
    undo()
    assert not reductions
    assert torch.equal(alone.loss, vocab_parallel_divergence(*logits, Divergence(), vocab_size=37, tp_group=None).loss)
    nothing = my_share(logits[0][:0], 1)
    assert vocab_parallel_divergence(
        nothing, nothing, Divergence(), vocab_size=37, tp_group=dist.group.WORLD
    ).loss.shape == (0,)


def worker() -> None:
    dist.init_process_group("gloo")
    for spec, vocab in [*product(SPECS, [37]), *product(SPECS[::5], [19])]:
        for check in (check_logits, check_linear):
            try:
                check(spec, vocab)
            except AssertionError as error:
                raise AssertionError(f"{check.__name__} {name_of(spec)}, vocabulary of {vocab}: {error}") from error
    for loss, vocab in product(SAMPLED_TOKEN, [37, 19]):
        check_sampled_token(loss, vocab)
    for kind in KINDS:
        check_identical(kind)
    check_ties()
    check_lone_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_over_ranks(world_size: int) -> None:
    run_distributed(worker, world_size)
