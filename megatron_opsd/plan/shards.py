"""Parameters, gradients and optimizer states of a rank, counted on Megatron's own modules without allocating memory.

One rank of each kind of pipeline stage is built on the meta device, in fake process groups. Its tensor-, expert- and
data-parallel neighbours hold shards of the same sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import lcm
from typing import Literal

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_opsd.config import ModelConfig, ParallelConfig
from megatron_opsd.model.gpt import build_model, transformer_config
from megatron_opsd.model.parallel import pretended_layout
from megatron_opsd.weights.architecture import Architecture
from megatron_opsd.weights.load import global_parameters


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank: its size, and the properties that Megatron's DDP reads."""

    name: str
    numel: int
    is_expert: bool
    is_shared_embedding: bool


@dataclass(frozen=True)
class RankBytes:
    """Bytes that training keeps on a rank from the first step to the last; ``teacher`` only while not offloaded."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    teacher_head: int
    average: int  # an ema teacher's float32 weights, where they are not the teacher's own


def stage_layers(arch: Architecture, model: ModelConfig, layout: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, as Megatron divides them."""
    config = transformer_config(arch, model, layout)
    return [get_num_layers_to_build(config, pp_rank=stage) for stage in range(layout.pipeline_model_parallel_size)]


@cache
def stage_parameters(
    arch: Architecture, model: ModelConfig, layout: ParallelConfig, world_size: int, stage: int
) -> tuple[Parameter, ...]:
    """The parameters of a stage's first rank, in Megatron's order."""
    first_rank = stage * (world_size // layout.pipeline_model_parallel_size)
    with pretended_layout(first_rank, world_size, layout) as groups, torch.device("meta"):
        gpt = build_model(arch, model, layout, groups.pg_collection)
    return tuple(
        Parameter(name, p.numel(), not getattr(p, "allreduce", True), getattr(p, "shared_embedding", False))
        for name, p in global_parameters(gpt)
    )


def rank_bytes(
    parameters: Sequence[Parameter],
    element: int,
    distributed: bool,
    dp_size: int,
    expert_dp_size: int,
    last: bool,
    teacher: Literal["frozen", "live", "ema"] | None,
) -> RankBytes:
    """Bytes of a rank's student and teacher.

    element: bytes of a parameter's element. distributed: optim.use_distributed_optimizer.
    teacher: its kind, None where the method has none. A live one is the student.
    dp_size, expert_dp_size: ranks that share the optimizer states of dense parameters and of experts.

    Gradients and Adam's two moments are float32. Parameters that are not float32 also have a float32 copy.
    """
    total = sum(parameter.numel for parameter in parameters)
    heads = [p.numel for p in parameters if p.name.endswith(("output_layer.weight", "word_embeddings.weight"))]
    owns_teacher = teacher in ("frozen", "ema")
    buffer, states = total, total
    if distributed:
        parts = [(False, dp_size), (True, expert_dp_size)]
        shards = [_shard([p for p in parameters if p.is_expert is is_expert], size) for is_expert, size in parts]
        buffer, states = (sum(numbers) for numbers in zip(*shards, strict=True))
    return RankBytes(
        weights=element * buffer,
        gradients=4 * buffer,
        optimizer=(8 if element == 4 else 12) * states,
        teacher=element * total if owns_teacher else 0,
        teacher_head=element * heads[-1] if last and owns_teacher else 0,
        average=4 * total if teacher == "ema" and element != 4 else 0,
    )


def _shard(parameters: Sequence[Parameter], dp_size: int) -> tuple[int, int]:
    """Elements of the distributed optimizer's buffer, and of the parameters in the share of the rank with the most.

    As in megatron.core.distributed.param_and_grad_buffer without overlap: parameters are in reverse order in one
    bucket. Each begins at a multiple of 64, and the bucket ends at a multiple of 128 and of the number of ranks. A
    shared embedding has its own bucket. Each rank owns an equal part of every bucket.
    """
    buckets: list[list[tuple[int, int]]] = [[]]
    for parameter in reversed(parameters):
        if parameter.is_shared_embedding and buckets[-1]:
            buckets.append([])
        start = -(-buckets[-1][-1][1] // 64) * 64 if buckets[-1] else 0
        buckets[-1].append((start, start + parameter.numel))
        if parameter.is_shared_embedding:
            buckets.append([])
    sizes = [-(-bucket[-1][1] // (unit := lcm(dp_size, 128))) * unit for bucket in buckets if bucket]
    owned = [0] * dp_size
    for bucket, size in zip(filter(None, buckets), sizes, strict=True):
        share = size // dp_size
        for start, stop in bucket:
            for rank in range(start // share, -(-stop // share)):
                owned[rank] += min(stop, (rank + 1) * share) - max(start, rank * share)
    return sum(sizes), max(owned)
