"""Megatron's optimizer and learning-rate schedule."""

import math

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opsd.config import OptimConfig
from megatron_opsd.student import Student


def build_optimizer(student: Student, config: OptimConfig) -> MegatronOptimizer:
    """Adam with float32 states (fused where Transformer Engine or Apex is installed, torch's otherwise)."""
    model = student.model.config
    return get_megatron_optimizer(
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


def build_schedule(optimizer: MegatronOptimizer, config: OptimConfig, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then ``decay_style`` over the run's ``steps``. Counts steps."""
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(steps, config.warmup_steps + 1),
        lr_decay_style=config.decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    schedule.step(1)  # the first update uses lr / warmup_steps, not zero
    return schedule


def optimizer_step(optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler) -> tuple[float, float]:
    """Clip, update, advance the schedule. Returns the gradient norm before clipping and the learning rate used.

    Raises:
        FloatingPointError: the norm is not finite. The weights are spoilt; the last checkpoint is not.
    """
    lr = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()  # pyright: ignore[reportGeneralTypeIssues]  # abstract, declared without result
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm}; resume from the last checkpoint with a lower lr")
    schedule.step(1)
    return float(grad_norm), lr
