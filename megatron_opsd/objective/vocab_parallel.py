"""The divergence from logits that each rank holds a share of."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opsd.objective.divergence import Divergence
from megatron_opsd.objective.types import DivergenceOutput, Normalizers, SavedForBackward, Tokens
from megatron_opsd.objective.vocab_shard import VocabShard


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: Divergence,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    token_ids: Tensor | None = None,
    inplace: bool = False,
) -> DivergenceOutput:
    """Divergence of each token's student distribution from the teacher's over a vocabulary spread over ``tp_group``.

    student_logits, teacher_logits  [n, v/tp], any floating dtype; rank r holds ids r·v/tp .. (r+1)·v/tp - 1. Ids from
                                    ``vocab_size`` on are padding: never read, gradient zero.
    token_ids                       [n] global ids of the sampled tokens, to have their log-probs too.
    inplace                         backward writes the gradient over ``student_logits`` instead of beside them, and
                                    then beyond both logits only O(n) numbers and a tile's temporaries exist. For
                                    logits that nothing reads after backward, the layer that made them included
                                    (a matrix product does not). A second backward raises RuntimeError; a leaf must
                                    not share its memory with anything that lives on.

    Returns per-token values, all [n] and equal on every rank; ``loss`` carries a gradient to ``student_logits`` only,
    in their dtype. Formulas: OPSD (arXiv 2601.18734) for the objective and its entry clip, Lin 1991 for ``jsd``; see
    docs/numerics.md. Three all-reduces forward, none backward; none at all without a group or in a group of one.

    A logit of -inf is a probability of zero. The divergence is then infinite where KL is (forward: the student's alone
    is zero; reverse: the teacher's alone), unless an ``entry`` or ``token`` clip holds it; ``jsd`` and ``skewed_kl``
    stay finite. The gradient of an infinite reverse KL is not finite, that of a forward KL is. NaN logits of real
    tokens make that token's values NaN.

    Raises ValueError for shapes that do not fit together or a vocabulary that does not fit its shards.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits must both be [n, v/tp], not {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    check_per_token("token_ids", token_ids, student_logits.shape[0])
    shard = VocabShard.of(student_logits.shape[1], vocab_size, tp_group)
    if inplace and student_logits.numel() and student_logits.data_ptr() == teacher_logits.data_ptr():
        raise ValueError("inplace would overwrite the teacher's logits: both sides are one tensor")
    return DivergenceOutput(
        *_Divergence.apply(student_logits, teacher_logits, token_ids, spec, vocab_size, shard, inplace)
    )


def check_per_token(name: str, values: Tensor | None, n: int) -> None:
    """Raise ValueError unless ``values`` is None or [n]."""
    if values is not None and values.shape != (n,):
        raise ValueError(f"{name} must have one value for each of {n} tokens, not shape {tuple(values.shape)}")


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        token_ids: Tensor | None,
        spec: Divergence,
        vocab_size: int,
        shard: VocabShard,
        inplace: bool,
    ) -> tuple[Tensor | None, ...]:
        student, teacher = student_logits[:, : shard.width], teacher_logits[:, : shard.width]
        tokens = Tokens(weights=student.new_ones(len(student)), ids=token_ids)
        output, saved = spec.measure(student, teacher, tokens, shard, vocab_size)
        normalizers, *rest = saved
        ctx.save_for_backward(student_logits, teacher_logits, *normalizers, *rest)
        ctx.spec, ctx.width, ctx.inplace = spec, shard.width, inplace
        ctx.mark_non_differentiable(*(value for value in output[1:] if value is not None))
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # A change of saved logits, such as an earlier backward in place, makes this raise.
        student_logits, teacher_logits, maxima, sums, log_ratio, *rest = ctx.saved_tensors
        student, teacher = student_logits[:, : ctx.width], teacher_logits[:, : ctx.width]
        saved = SavedForBackward(Normalizers(maxima, sums, log_ratio), *rest)
        gradient = student_logits.detach() if ctx.inplace else torch.empty_like(student_logits)
        gradient[:, ctx.width :] = 0
        ctx.spec.write_gradient(student, teacher, saved, grads[0], gradient[:, : ctx.width])
        return gradient, *[None] * 6
