"""Megatron's optimizer and learning-rate schedule."""

import math
from typing import NamedTuple
from zlib import crc32

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_opsd.compat.megatron_internals import (
    HAVE_APEX_OR_TE,
    clip_gradients,
    main_params,
    moments,
    repair_checkpoints_of_torch_adam,
)
from megatron_opsd.config import OptimConfig
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import ModelChunks
from megatron_opsd.model.student import Student
from megatron_opsd.weights.load import global_parameters

DITHER_PIECE = 1 << 24  # weights, for whose temporaries there is always room


def build_optimizer(student: Student, config: OptimConfig) -> MegatronOptimizer:
    """Adam with float32 states (fused where Transformer Engine or Apex is installed, torch's otherwise)."""
    if not HAVE_APEX_OR_TE:
        repair_checkpoints_of_torch_adam()
    model = student.model_chunks.config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model.bf16,
            params_dtype=model.params_dtype,
            use_distributed_optimizer=config.use_distributed_optimizer,
        ),
        [*student.ddp_chunks],
    )
    if model.bf16 and config.dither:
        _dither(optimizer, student.model_chunks)
    return optimizer


def _dither(optimizer: MegatronOptimizer, model_chunks: ModelChunks) -> None:
    """Put each float32 parameter at a random place among the numbers that round to its bfloat16 weight.

    A checkpoint's weights are bfloat16 numbers. Without this every float32 parameter starts in the middle of its
    rounding interval, which is wider than dozens of small steps: the model does not move meanwhile, and then too many
    weights jump at once. From random places the rounded weights follow their parameters on average from the first step
    on (dither: Schuchman 1964). No weight of the model changes here.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in global_parameters(model_chunks)}
    for chunk in (model_chunks.first, model_chunks.last):
        if chunk.share_embeddings_and_output_weights and (chunk.pre_process or chunk.post_process):
            names[chunk.shared_embedding_or_output_weight()] = "embedding"  # the first and the last stage's
    for weight, main_param, own in main_params(optimizer):
        # Ranks that hold the same weight must draw the same numbers (on GPUs: of one model of card).
        generator = torch.Generator(weight.device).manual_seed(crc32(names[weight].encode()))
        pieces = weight.detach().flatten().split(DITHER_PIECE)
        spread = torch.cat([dithered(piece, generator) for piece in pieces])
        main_param.data.copy_(spread[own].view_as(main_param))


def dithered(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 numbers, evenly spread over those that round to each of a bfloat16 tensor's."""
    middle, infinity = weight.float(), torch.full_like(weight, math.inf)
    up = (torch.nextafter(weight, infinity).float() - middle) / 2
    down = (middle - torch.nextafter(weight, -infinity).float()) / 2
    spread = middle - down + (up + down) * torch.rand(weight.shape, generator=generator, device=weight.device)
    return torch.where(spread.to(weight.dtype) == weight, spread, middle)  # the ends of the interval may round away


def build_schedule(optimizer: MegatronOptimizer, config: OptimConfig, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then ``decay_style`` over the run's ``steps``. Counts steps."""
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(steps, config.warmup_steps) + 1,  # min_lr comes after the last step
        lr_decay_style=config.decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    schedule.step(1)  # the first update uses lr / warmup_steps, not zero
    return schedule


class OptimizerStates:
    """Where the optimizer's states are. With ``optim.placement = "offload"`` they are in pinned host memory, and on the
    GPU during the optimizer's step only.

    The distributed optimizer's float32 parameters are states too where the model's are bfloat16.
    """

    def __init__(self, optimizer: MegatronOptimizer, config: OptimConfig) -> None:
        self.offloads = config.placement == "offload" and torch.cuda.is_available()
        self._optimizer = optimizer
        self._host: list[Tensor] = []  # made once, in the order of _tensors

    def offload(self) -> None:
        """Move them off the device."""
        if not self.offloads:
            return
        tensors = self._tensors()
        if len(tensors) != len(self._host):  # Adam makes its moments in its first step
            self._host = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        for tensor, host in zip(tensors, self._host, strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        for tensor, host in zip(tensors, self._host, strict=True):
            tensor.data = host

    def load(self) -> None:
        """Move them onto the device."""
        for tensor in self._tensors() if self.offloads else []:
            tensor.data = tensor.to(parallel.device(), non_blocking=True)

    def _tensors(self) -> list[Tensor]:
        # Others that the optimizer steps are views of the model's own parameters.
        return [main_param for _, main_param, _ in main_params(self._optimizer)] + moments(self._optimizer)


class Update(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float  # before clipping
    lr: float
    applied: bool  # whether the weights changed


def optimizer_step(optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler, loss: float) -> Update:
    """Clip, update, advance the schedule. Where loss or gradient is not finite the weights stay as they are."""
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())  # of all ranks
    lr = optimizer.param_groups[0]["lr"]
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        clip_gradients(optimizer, grad_norm)
        optimizer.step_with_ready_grads()
    schedule.step(1)
    return Update(grad_norm, lr, finite)
