"""Megatron's optimizer and learning-rate schedule."""

import math
from itertools import chain
from typing import Any
from zlib import crc32

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_opsd.config import OptimConfig
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import HiddenStateGPT
from megatron_opsd.model.student import Student
from megatron_opsd.weights.load import global_parameters

DITHER_PIECE = 1 << 24  # weights, for whose temporaries there is always room


def build_optimizer(student: Student, config: OptimConfig) -> MegatronOptimizer:
    """Adam with float32 states (fused where Transformer Engine or Apex is installed, torch's otherwise)."""
    if not HAVE_APEX_OR_TE:
        _repair_checkpoints_of_torch_adam()
    model = student.model.config
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
        [student.ddp],
    )
    if model.bf16 and config.dither:
        _dither(optimizer, student.model)
    return optimizer


def _dither(optimizer: MegatronOptimizer, model: HiddenStateGPT) -> None:
    """Put each float32 parameter at a random place among the numbers that round to its bfloat16 weight.

    A checkpoint's weights are bfloat16 numbers. Without this every float32 parameter starts in the middle of its
    rounding interval, which is wider than dozens of small steps: the model stands still meanwhile, and then too many
    weights jump at once. From random places the rounded weights follow their parameters on average from the first step
    on (dither: Schuchman 1964). No weight of the model changes here.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in global_parameters(model)}
    if model.share_embeddings_and_output_weights and (model.pre_process or model.post_process):
        names[model.shared_embedding_or_output_weight()] = "embedding"  # the first and the last stage's
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        distributed = isinstance(part, DistributedOptimizer)
        weights = part.model_float16_groups if distributed else part.float16_groups
        masters = part.shard_fp32_from_float16_groups if distributed else part.fp32_from_float16_groups
        for weight, master in zip(chain(*weights), chain(*masters), strict=True):
            # Ranks that hold the same weight must draw the same numbers (on GPUs: of one model of card).
            generator = torch.Generator(weight.device).manual_seed(crc32(names[weight].encode()))
            pieces = weight.detach().flatten().split(DITHER_PIECE)
            spread = torch.cat([dithered(piece, generator) for piece in pieces])
            if distributed:
                own = part._get_model_param_range_map(weight)["param"]
                spread = spread[own.start : own.end]
            master.data.copy_(spread.view_as(master))


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
    """Where the optimizer's states are: under ``optim.placement = "offload"`` on a GPU, in pinned host memory but for
    its own step.

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
        parts = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        tensors = []
        for part in parts:
            # Others that the optimizer steps are views of the model's own parameters.
            tensors += [parameter for group in part.shard_fp32_from_float16_groups for parameter in group]
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    # Megatron takes an entry, even an empty one, for states that it need not make when it loads.
                    states = part.optimizer.state.get(parameter, {}).values()
                    tensors += [state for state in states if torch.is_tensor(state) and state.dim()]
        return tensors


def optimizer_step(
    optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler, loss: float
) -> tuple[float, float, bool]:
    """Clip, update, advance the schedule. Where loss or gradient is not finite the weights stay as they are.

    Returns the gradient norm before clipping, the learning rate, and whether the weights were updated.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())  # of all ranks
    lr = optimizer.param_groups[0]["lr"]
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    schedule.step(1)
    return grad_norm, lr, finite


def _repair_checkpoints_of_torch_adam() -> None:
    """Round-trip torch's Adam through the distributed optimizer's checkpoints (three repairs, see the comments).

    Megatron is written for the fused Adam of Transformer Engine or Apex and takes torch's where neither is installed.
    """
    describe_state, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def describe(self: Any) -> dict:
        for group in self.optimizer.param_groups:  # torch's Adam has no state to load into before its first step
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return describe_state(self)

    def load(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for param_state in self.optimizer.state.values():  # Megatron restores one shared tensor, and torch's Adam
            param_state["step"] = param_state["step"].clone()  # would count it up once for each parameter

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":  # only torch's Adam has it in the state; Megatron keeps it in the group
                target.copy_(tensors[key])

    DistributedOptimizer.state_dict = describe
    DistributedOptimizer.load_state_dict = load
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
