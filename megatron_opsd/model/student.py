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
from megatron_opsd.objective import HighEntropy, TokenLoss, Tokens, linear_loss
from megatron_opsd.objective.types import DivergenceOutput, PolicyOutput

# Sums that are means over their own number of tokens, not over all.
OF_SOME = {"refit_logprob_gap": "sampled", "divergence_end_of_turn": "ends"}


@dataclass(frozen=True)
class LossSums:
    """A loss and its diagnostics as sums, so that any split of the batch adds up to the same means.

    entropies: of the global batch's tokens that are trained on, where they are wanted.
    """

    sums: dict[str, float]
    worst_gap: float
    worst_sequence: int
    entropies: Tensor

    @property
    def tokens(self) -> float:
        """Whose loss was computed."""
        return self.sums["tokens"]

    @property
    def count(self) -> float:
        """What the loss was divided by."""
        return self.sums["count"]

    def means(self) -> dict[str, float]:
        """Means over the response tokens of the global batch; the loss as it was normalised."""
        counts = {"loss": "count", **OF_SOME}
        numbers = {"tokens", *counts.values()}
        divisors = {name: self.sums[counts.get(name, "tokens")] for name in self.sums.keys() - numbers}
        return {
            name: self.sums[name] / max(1.0, divisor)
            for name, divisor in divisors.items()
            if divisor or name not in OF_SOME
        }

    def entropy_threshold(self, share: float) -> float | None:
        """The entropy that ``share`` of the tokens reach; None without any."""
        if not len(self.entropies):
            return None
        highest = self.entropies.sort(descending=True).values
        return highest[math.ceil(share * len(highest)) - 1].item()


def measure_loss(
    loss: Tensor, count: Tensor, out: DivergenceOutput | PolicyOutput, microbatch: Microbatch
) -> dict[str, Tensor]:
    """Sums of one micro-batch over its tokens, and the token on which training and rollout differ most."""
    assert out.student_logprobs is not None
    gap = (out.student_logprobs - microbatch.rollout_logprobs).abs()[microbatch.is_sampled]
    per_token = {
        "logprob_student": out.student_logprobs,
        "entropy_student": out.entropy_student,
        "refit_logprob_gap": gap,
        "sampled": microbatch.is_sampled,
    }
    if isinstance(out, DivergenceOutput):
        assert out.teacher_logprobs is not None
        per_token |= {
            "divergence": out.unclipped,
            "divergence_end_of_turn": out.unclipped[microbatch.is_end],
            "ends": microbatch.is_end,
            "clip_fraction": out.clip_count > 0,
            "logprob_teacher": out.teacher_logprobs,
            "agreement": out.agree,
            "entropy_teacher": out.entropy_teacher,
        }
    return {
        "loss": loss.detach().double(),
        **{name: values.sum(dtype=torch.float64) for name, values in per_token.items()},
        "tokens": torch.tensor(out.student_logprobs.numel()),
        "count": count,
        "worst_gap": gap.max() if gap.numel() else torch.tensor(-1.0),
        "worst_sequence": (
            microbatch.sequence[microbatch.is_sampled][gap.argmax()] if gap.numel() else torch.tensor(-1)
        ),
    }


def reduce_loss(reports: Sequence[dict[str, Tensor]], layout: Layout) -> LossSums:
    """Add up micro-batches and data-parallel ranks; every rank of the pipeline gets the result."""
    gathered: list[tuple[list[dict[str, float]], Tensor]] = [([], torch.empty(0))] * layout.dp_group.size()
    if layout.is_last_stage:
        entropies = [report["entropies"] for report in reports if "entropies" in report]
        own = (
            [{name: value.item() for name, value in report.items() if name != "entropies"} for report in reports],
            torch.cat(entropies).cpu() if entropies else torch.empty(0),
        )
        dist.all_gather_object(gathered, own, group=layout.dp_group)
    dist.broadcast_object_list(gathered, src=layout.last_stage_rank, group=layout.pp_group)
    parts = [part for rank, _ in gathered for part in rank]
    worst = max(parts, key=lambda part: (math.isnan(part["worst_gap"]), part["worst_gap"]))
    names = parts[0].keys() - {"worst_gap", "worst_sequence"}
    return LossSums(
        sums={name: sum(part[name] for part in parts) for name in names},
        worst_gap=worst["worst_gap"],
        worst_sequence=int(worst["worst_sequence"]),
        entropies=torch.cat([entropies for _, entropies in gathered]),
    )


class Student:
    """Owns the model's gradients: forward and backward over a step's micro-batches, nothing else."""

    def __init__(
        self, model_chunks: ModelChunks, layout: Layout, config: Config, vocab_size: int, token_loss: TokenLoss
    ) -> None:
        self.model_chunks, self.layout, self.vocab_size, self.token_loss = model_chunks, layout, vocab_size, token_loss
        self.objective = config.objective
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
        self,
        microbatches: Sequence[Microbatch],
        teacher_head: Tensor | None,
        teacher_hidden: Sequence[Tensor],
        entropy_threshold: float | None = None,
    ) -> LossSums:
        """Gradients of the global batch's mean loss, summed over ranks and divided once, into ``main_grad``.

        teacher_head, teacher_hidden: the teacher's LM head [v/tp, h] and its hidden states of each micro-batch [n, h];
        None and empty without a teacher, and on other stages than the last.
        entropy_threshold: tokens whose entropy is lower are not learned from; None to learn from all.
        Returns the loss and its diagnostics over the global batch, on every rank.
        """
        for ddp in self.ddp_chunks:
            ddp.zero_grad_buffer()
            ddp.train()
        b, length = microbatches[0].student.tokens.shape  # for a pipeline, in which they all have one shape
        work = list(zip(microbatches, teacher_hidden or [None] * len(microbatches), strict=True))
        token_loss = self.token_loss if entropy_threshold is None else HighEntropy(self.token_loss, entropy_threshold)
        reports = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, token_loss, teacher_head),
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
        token_loss: TokenLoss,
        teacher_head: Tensor | None,
        work: Iterator[tuple[Microbatch, Tensor | None]],
        model: DistributedDataParallel,
    ) -> tuple[Tensor, partial]:
        microbatch, teacher_hidden = next(work)
        loss = partial(self._loss, token_loss, microbatch, teacher_hidden, teacher_head)
        return forward(model, microbatch.student), loss

    def _loss(
        self,
        token_loss: TokenLoss,
        microbatch: Microbatch,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        hidden: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of the weighted losses, the count Megatron divides by, and what is logged."""
        whole = self.model_chunks.last.head_input(hidden)  # [s, b, h]
        tokens = Tokens(
            microbatch.token_weights, microbatch.response_ids, microbatch.advantages, microbatch.rollout_logprobs
        )
        teacher = None
        if token_loss.needs_teacher:
            assert teacher_hidden is not None
            assert teacher_head is not None
            teacher = teacher_hidden, teacher_head
        loss, out = linear_loss(
            token_loss,
            whole.flatten(0, 1)[microbatch.student.index],  # [n, h]
            self.model_chunks.last.head_weight(),
            tokens,
            teacher,
            vocab_size=self.vocab_size,
            tp_group=self.layout.tp_group,
            chunk_size=self.objective.chunk_size,
        )
        trained = microbatch.token_weights != 0
        kept, count = trained, torch.tensor(microbatch.count, device=loss.device)
        if isinstance(token_loss, HighEntropy):
            kept = trained & token_loss.keeps(out.entropy_student)
            count = kept.sum() if self.objective.normalization == "token" else count
        report = measure_loss(loss, count, out, microbatch)
        if self.objective.entropy_share < 1:
            report |= {"kept_share": kept.sum(), "entropies": out.entropy_student[trained]}
        return loss, count.int(), report
