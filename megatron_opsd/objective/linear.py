"""A token loss from hidden states and LM heads, some tokens at a time: whole logits never exist."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opsd.objective.divergence import Divergence
from megatron_opsd.objective.types import DivergenceOutput, TokenLoss, Tokens
from megatron_opsd.objective.vocab_parallel import check_per_token
from megatron_opsd.objective.vocab_shard import VocabShard

Side = tuple[Tensor, Tensor]  # final hidden states [n, h] and this rank's rows of the LM head [v/tp, h]


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    spec: Divergence,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    token_ids: Tensor | None = None,
    chunk_size: int = 2048,
) -> tuple[Tensor, DivergenceOutput]:
    """Σ token_weights · divergence: ``linear_loss`` of a ``Divergence``, whose values are those of
    ``vocab_parallel_divergence``.

    teacher_hidden, teacher_weight  as the student's, [n, h] and [v/tp, h]; the weight may be the student's
    token_weights, token_ids        [n], see ``Tokens``; with token_ids the log-probs of these tokens are returned too

    Three all-reduces a chunk forward, none backward.
    """
    tokens = Tokens(token_weights, token_ids)
    return linear_loss(
        spec, student_hidden, student_weight, tokens, (teacher_hidden, teacher_weight),
        vocab_size=vocab_size, tp_group=tp_group, chunk_size=chunk_size,
    )  # fmt: skip


def linear_loss(
    token_loss: TokenLoss,
    student_hidden: Tensor,
    student_weight: Tensor,
    tokens: Tokens,
    teacher: Side | None,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    chunk_size: int = 2048,
) -> tuple[Tensor, Any]:
    """Σ tokens.weights · loss, from final hidden states and LM heads spread over ``tp_group``.

    student_hidden  [n, h], whole on every rank (under sequence parallel: gathered)
    student_weight  [v/tp, h], this rank's rows
    teacher         the same of the teacher; None where ``token_loss`` needs none. The weights may be one tensor.
    vocab_size      ids from here on are padding: their rows are never read, their gradient is zero
    chunk_size      tokens whose logits exist at once

    Returns the scalar loss and the values per token that ``token_loss`` measures, all detached. Gradients, to
    ``student_hidden`` and ``student_weight`` only, are made in forward beside the logits and wait for the incoming
    gradient: the head's in float32 (float64), the hidden states' in their dtype. **The hidden states' gradient is this
    rank's part**: the caller's Megatron region sums it over ranks, once. Without grad mode none is made.

    A head with Megatron's ``grad_added_to_main_grad`` receives its gradient in ``main_grad``, like Megatron's own
    linear layers do. bf16 and fp16 products are made in that dtype and everything after them in float32; where the
    device can (CUDA), the products come out in float32 as well.

    Raises ValueError for shapes that do not fit together or a vocabulary that does not fit its shards.
    """
    n = student_hidden.shape[0]
    hidden = [student_hidden] + ([] if teacher is None else [teacher[0]])
    if any(side.dim() != 2 or side.shape[0] != n for side in hidden):
        raise ValueError(f"hidden states must all be [n, h], not {' and '.join(str(tuple(x.shape)) for x in hidden)}")
    if teacher is not None and student_weight.shape[0] != teacher[1].shape[0]:
        raise ValueError(f"heads differ in rows: {student_weight.shape[0]} and {teacher[1].shape[0]}")
    if (teacher is not None) != token_loss.needs_teacher:
        raise ValueError(f"{token_loss} {'needs a' if token_loss.needs_teacher else 'has no use for a'} teacher")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    for name, values in tokens._asdict().items():
        check_per_token(f"token_{name}", values, n)
    shard = VocabShard.of(student_weight.shape[0], vocab_size, tp_group)
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (student_hidden, student_weight))
    kinds: list[type] = []  # of the values: autograd hands on plain tuples
    loss, *values = _LinearLoss.apply(
        student_hidden, student_weight, teacher, token_loss, tokens, vocab_size, shard, chunk_size, wanted, kinds
    )
    return loss, kinds[0](*values)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Side | None,
        token_loss: TokenLoss,
        tokens: Tokens,
        vocab_size: int,
        shard: VocabShard,
        chunk_size: int,
        wanted: tuple[bool, bool],
        kinds: list[type],
    ) -> tuple[Tensor | None, ...]:
        head = student_weight[: shard.width]
        gradients = _Gradients(student_hidden, student_weight, wanted)
        outputs = []
        for start in range(0, max(1, len(student_hidden)), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden, chunk = student_hidden[rows], tokens.chunk(rows)
            logits = _matmul(hidden, head.t())
            teacher_logits = None if teacher is None else _matmul(teacher[0][rows], teacher[1][: shard.width].t())
            output, saved = token_loss.measure(logits, teacher_logits, chunk, shard, vocab_size)
            outputs.append(output)
            if any(wanted):
                gradient = logits if logits.dtype == hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
                token_loss.write_gradient(logits, teacher_logits, saved, chunk.weights, gradient)
                gradients.add(start, gradient, hidden, head)
                del gradient
            del logits, teacher_logits  # before the next chunk's are made
        kinds.append(type(outputs[0]))
        values: list[Any] = [None if v[0] is None else torch.cat(v) for v in zip(*outputs, strict=True)]
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*(value for value in values if value is not None))
        loss = torch.where(tokens.weights == 0, 0, tokens.weights * values[0]).sum(dtype=values[0].dtype)
        return loss, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ctx.gradients.scaled(grads[0]), *[None] * 8


class _Gradients:
    """Gradients made in forward, waiting for the factor that only backward knows."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> None:
        wants_hidden, wants_weight = wanted
        self.parameter = weight
        self.spent = False
        self.hidden = torch.empty_like(hidden) if wants_hidden else None
        precise = torch.promote_types(torch.float32, weight.dtype)
        self.weight = torch.empty_like(weight, dtype=precise) if wants_weight else None

    def add(self, start: int, logits_gradient: Tensor, hidden: Tensor, head: Tensor) -> None:
        """Take in the gradient of some tokens' logits, [rows, width], made of hidden [rows, h] and head [width, h]."""
        if self.hidden is not None:
            self.hidden[start : start + len(hidden)] = logits_gradient @ head
        if self.weight is not None:
            real, padding = self.weight[: len(head)], self.weight[len(head) :]
            _matmul(logits_gradient.t(), hidden, add_to=real, keep=start > 0)
            padding.zero_()

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What backward returns for hidden states and head. Their memory is then free for the next micro-batch's."""
        if self.spent:
            raise RuntimeError("linear_loss's backward ran already: its gradients are made once, in forward")
        hidden, weight, self.hidden, self.weight, self.spent = self.hidden, self.weight, None, None, True
        return (
            None if hidden is None else hidden.mul_(factor),
            None if weight is None else self._deliver(weight, factor),
        )

    def _deliver(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """Add the head's gradient to ``main_grad`` if Megatron's data parallel wrapper set its flag, else return it.

        The protocol of megatron.core.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication: autograd
        still wants a gradient, so that the wrapper's hook runs, and the hook reads it only under ``zero_out_wgrad``
        (a tied embedding adds its own to it).
        """
        parameter: Any = self.parameter
        if not hasattr(parameter, "grad_added_to_main_grad"):
            return gradient.mul_(factor).to(parameter.dtype)
        parameter.main_grad.addcmul_(gradient, factor.to(gradient.dtype))
        parameter.grad_added_to_main_grad = True
        return (
            torch.zeros_like(parameter) if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like(parameter)
        )


def _matmul(left: Tensor, right: Tensor, *, add_to: Tensor | None = None, keep: bool = True) -> Tensor:
    """left @ right, in float32 where a low-precision product can come out so for free; added to or put in place of one.

    The place has the precision that the product comes out in, or a higher one.
    """
    widens = left.is_cuda and left.dtype in (torch.bfloat16, torch.float16)
    if add_to is None:
        return torch.mm(left, right, out_dtype=torch.float32) if widens else left @ right
    if widens:
        return torch.addmm(add_to, left, right, out_dtype=torch.float32, beta=int(keep), out=add_to)
    if add_to.dtype == left.dtype:
        return add_to.addmm_(left, right, beta=int(keep))
    return add_to.add_(left @ right) if keep else add_to.copy_(left @ right)
