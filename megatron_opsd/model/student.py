"""The model that learns: DDP around Megatron's GPTModel, and one forward and backward pass through its schedule."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opsd.config import Config
from megatron_opsd.data.batch import Microbatch
from megatron_opsd.model.gpt import ModelChunks, forward
from megatron_opsd.model.parallel import Layout
from megatron_opsd.objective import TokenLoss, Tokens, linear_loss
from megatron_opsd.objective.types import DivergenceOutput, PolicyOutput


@dataclass(frozen=True)
class LossSums:
    """A loss and its diagnostics as sums, so that any split of the batch adds up to the same means."""

    sums: dict[str, float]
    tokens: float
    count: float
    worst_gap: float
    worst_sequence: int

    def means(self) -> dict[str, float]:
        """Means over the response tokens of the global batch; the loss as it was normalised."""
        means = {name: value / max(1.0, self.tokens) for name, value in self.sums.items()}
        return means | {"loss": self.sums["loss"] / max(1.0, self.count)}


def measure_loss(loss: Tensor, out: DivergenceOutput | PolicyOutput, microbatch: Microbatch) -> dict[str, Tensor]:
    """Sums of one micro-batch over its tokens, and the token on which training and rollout differ most."""
    assert out.student_logprobs is not None
    per_token = {"logprob_student": out.student_logprobs, "entropy_student": out.entropy_student}
    gap = out.student_logprobs[:0]  # [n], or nothing where no engine wrote the tokens
    if microbatch.rollout_logprobs is not None:
        per_token["refit_logprob_gap"] = gap = (out.student_logprobs - microbatch.rollout_logprobs).abs()
    if isinstance(out, DivergenceOutput):
        assert out.teacher_logprobs is not None
        per_token |= {
            "divergence": out.unclipped,
            "clip_fraction": out.clip_count > 0,
            "logprob_teacher": out.teacher_logprobs,
            "agreement": out.agree,
            "entropy_teacher": out.entropy_teacher,
        }
    return {
        "loss": loss.detach().double(),
        **{name: values.sum(dtype=torch.float64) for name, values in per_token.items()},
        "tokens": torch.tensor(out.student_logprobs.numel()),
        "count": torch.tensor(microbatch.count),
        "worst_gap": gap.max() if gap.numel() else torch.tensor(-1.0),
        "worst_sequence": microbatch.sequence[gap.argmax()] if gap.numel() else torch.tensor(-1),
    }


def reduce_loss(reports: Sequence[dict[str, Tensor]], layout: Layout) -> LossSums:
    """Add up micro-batches and data-parallel ranks; every rank of the pipeline gets the result."""
    gathered: list[list[dict[str, float]]] = [[] for _ in range(layout.dp_group.size())]
    if layout.is_last_stage:
        own = [{name: value.item() for name, value in report.items()} for report in reports]
        dist.all_gather_object(gathered, own, group=layout.dp_group)
    dist.broadcast_object_list(gathered, src=layout.last_stage_rank, group=layout.pp_group)
    parts = [part for rank in gathered for part in rank]
    worst = max(parts, key=lambda part: (math.isnan(part["worst_gap"]), part["worst_gap"]))
    names = parts[0].keys() - {"tokens", "count", "worst_gap", "worst_sequence"}
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    return LossSums(
        sums={name: total[name] for name in names},
        tokens=total["tokens"],
        count=total["count"],
        worst_gap=worst["worst_gap"],
        worst_sequence=int(worst["worst_sequence"]),
    )


class Student:
    """Owns the model's gradients: forward and backward over a step's micro-batches, nothing else."""

    def __init__(
        self, model_chunks: ModelChunks, layout: Layout, config: Config, vocab_size: int, token_loss: TokenLoss
    ) -> None:
        self.model_chunks, self.layout, self.vocab_size, self.token_loss = model_chunks, layout, vocab_size, token_loss
        self.chunk_size = config.objective.chunk_size
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.optim.use_distributed_optimizer,
            overlap_grad_reduce=False,
            average_in_collective=False,
        )
        self.ddp_chunks = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in model_chunks]
        no_sync = [ddp.no_sync for ddp in self.ddp_chunks]
        model_chunks.config.finalize_model_grads_func = finalize_model_grads
        model_chunks.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # type: ignore[assignment]

    def forward_backward(
        self, microbatches: Sequence[Microbatch], teacher_head: Tensor | None, teacher_hidden: Sequence[Tensor]
    ) -> LossSums:
        """Gradients of the global batch's mean loss, summed over ranks and divided once, into ``main_grad``.

        teacher_head, teacher_hidden: the teacher's LM head [v/tp, h] and its hidden states of each micro-batch [n, h];
        None and empty without a teacher, and on other stages than the last.
        Returns the loss and its diagnostics over the global batch, on every rank.
        """
        for ddp in self.ddp_chunks:
            ddp.zero_grad_buffer()
            ddp.train()
        b, length = microbatches[0].student.tokens.shape  # for a pipeline, in which they all have one shape
        work = list(zip(microbatches, teacher_hidden or [None] * len(microbatches), strict=True))
        reports = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, teacher_head),
            data_iterator=[iter(work) for _ in self.ddp_chunks],
            model=[*self.ddp_chunks],
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=b,
            forward_only=False,
        )
        return reduce_loss(reports, self.layout)

    def _forward_step(
        self,
        teacher_head: Tensor | None,
        work: Iterator[tuple[Microbatch, Tensor | None]],
        model: DistributedDataParallel,
    ) -> tuple[Tensor, partial]:
        microbatch, teacher_hidden = next(work)
        return forward(model, microbatch.student), partial(self._loss, microbatch, teacher_hidden, teacher_head)

    def _loss(
        self, microbatch: Microbatch, teacher_hidden: Tensor | None, teacher_head: Tensor | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of the weighted losses, the count Megatron divides by, and what is logged."""
        whole = self.model_chunks.last.head_input(hidden)  # [s, b, h]
        tokens = Tokens(
            microbatch.token_weights, microbatch.response_ids, microbatch.advantages, microbatch.rollout_logprobs
        )
        teacher = None
        if self.token_loss.needs_teacher:
            assert teacher_hidden is not None
            assert teacher_head is not None
            teacher = teacher_hidden, teacher_head
        loss, out = linear_loss(
            self.token_loss,
            whole.flatten(0, 1)[microbatch.student.index],  # [n, h]
            self.model_chunks.last.head_weight(),
            tokens,
            teacher,
            vocab_size=self.vocab_size,
            tp_group=self.layout.tp_group,
            chunk_size=self.chunk_size,
        )
        count = torch.tensor(microbatch.count, dtype=torch.int, device=loss.device)
        return loss, count, measure_loss(loss, out, microbatch)
