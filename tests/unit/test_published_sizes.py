"""Every published size, on all ranks of several layouts, without its weights: models on the meta device, no network.

For each layout all ranks load the model through the real code, from a checkpoint that only remembers what it was asked
for. Each element of each Hugging Face tensor must have been read by the right number of ranks.
"""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from megatron_opsd.config import Config, ModelConfig, ParallelConfig
from megatron_opsd.model.gpt import ModelChunks, build_model
from megatron_opsd.model.parallel import pretended_layout
from megatron_opsd.plan.preflight import check_parallel
from megatron_opsd.weights.architecture import Architecture, read_architecture
from megatron_opsd.weights.load import global_parameters, load_hf
from megatron_opsd.weights.mapping import NameTable, Shape, Shard
from megatron_opsd.weights.published import PUBLISHED

# Tensor-, pipeline-, expert-parallel sizes and ranks: layers that stages do not share evenly, as many tensor-parallel
# ranks as there are query groups, experts over more ranks than tensor parallelism has and, in the twins, over fewer.
LAYOUTS = {
    "Qwen3-0.6B": [(1, 1, 1, 2), (2, 2, 1, 8), (8, 1, 1, 8)],
    "Qwen3-1.7B": [(2, 1, 1, 4), (4, 3, 1, 24)],
    "Qwen3-4B": [(4, 1, 1, 8), (2, 8, 1, 16)],
    "Qwen3-8B": [(8, 2, 1, 16), (2, 5, 1, 20)],
    "Qwen3-14B": [(8, 4, 1, 32), (4, 3, 1, 12)],
    "Qwen3-32B": [(8, 4, 1, 64), (4, 6, 1, 24)],
    "Qwen3-30B-A3B": [(1, 1, 16, 16), (4, 2, 16, 32), (2, 5, 8, 40)],
    "Qwen3-235B-A22B": [(4, 8, 8, 64)],
    "Qwen2.5-1.5B": [(2, 2, 1, 8)],
    "Qwen2.5-7B": [(4, 3, 1, 24)],
}


def parallel_config(tp: int, pp: int, ep: int) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        sequence_parallel=tp > 1,
    )


class Ledger:
    """A checkpoint on the meta device that notes how many ranks read which slice."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.shapes, self.ranks = shapes, 0
        self.readers: dict[str, Counter] = defaultdict(Counter)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        shape = list(self.shapes[name])
        self.readers[name][(dim, start, stop)] += self.ranks
        if dim is not None:
            assert stop is not None
            assert 0 <= start < stop <= shape[dim], name
            shape[dim] = stop - start
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def hf_shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes of the tensors in a checkpoint that transformers would write."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        tensors = revert_weight_conversion(model, model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def parameters_of(rank: int, world_size: int, arch: Architecture, config: ParallelConfig) -> ModelChunks:
    with pretended_layout(rank, world_size, config) as layout, torch.device("meta"):
        return build_model(arch, ModelConfig(path="unread"), config, layout.pg_collection).to("meta")


def describe(model: ModelChunks) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in global_parameters(model)]


def check_layout(arch: Architecture, shapes: dict[str, Shape], config: ParallelConfig, world_size: int) -> None:
    stages: dict[int, list[tuple[int, Shard]]] = defaultdict(list)
    for rank in range(world_size):
        with pretended_layout(rank, world_size, config) as layout:
            stages[layout.pp_group.rank()].append((rank, layout.shard))
    table, ledger = NameTable(arch), Ledger(shapes)
    for stage, ranks in stages.items():
        (first, _), (last, _) = ranks[0], ranks[-1]
        model = parameters_of(first, world_size, arch, config)
        # One model serves for all ranks of a stage: their parameters have the same names and shapes.
        if stage == len(stages) - 1:
            other = parameters_of(last, world_size, arch, config)
            assert describe(other) == describe(model)
        for shard, count in Counter(shard for _, shard in ranks).items():
            ledger.ranks = count
            load_hf(model, ledger, table, shard)  # type: ignore[arg-type]
    check_ledger(ledger, arch, config, world_size // len(stages))


def check_ledger(ledger: Ledger, arch: Architecture, config: ParallelConfig, ranks_of_a_stage: int) -> None:
    assert ledger.readers.keys() == ledger.shapes.keys()
    tp, pp, ep = (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.expert_model_parallel_size,
    )
    for name, readers in ledger.readers.items():
        shape = ledger.shapes[name]
        ((dim, slices),) = {dim: sorted(x for x in readers if x[0] == dim) for dim, *_ in readers}.items()
        copies = 2 if pp > 1 and name == "model.embed_tokens.weight" and arch.share_embeddings_and_output_weights else 1
        if dim is None:
            split_over = ep if ".experts." in name else 1
            assert "norm" in name or ".mlp." in name, name  # what a stage's ranks hold whole
        else:
            split_over = tp
            edges = [0, *(stop for _, _, stop in slices)]
            assert [start for _, start, _ in slices] == edges[:-1], name  # neither gap nor overlap
            assert edges[-1] == shape[dim], name
        assert set(readers.values()) == {ranks_of_a_stage // split_over * copies}, name


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_tensor_has_the_right_owners(size: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[size]))
    arch = read_architecture(tmp_path)
    shapes = hf_shapes(tmp_path)
    assert NameTable(arch).hf_tensors() == shapes
    for tp, pp, ep, world_size in LAYOUTS[size]:
        config = parallel_config(tp, pp, ep)
        run = Config.model_validate({"model": {"path": str(tmp_path)}, "data": {"path": "unread"}, "parallel": config})
        check_parallel(run, arch, world_size)
        check_layout(arch, shapes, config, world_size)
        ranks = world_size // pp
        for experts in {ep, min(ep, max(1, tp // 2))}:
            check_order(shrunken(arch, tp), parallel_config(tp, 1, experts), ranks)


def shrunken(arch: Architecture, tp: int) -> Architecture:
    """The same heads, groups and experts with small sizes."""
    moe = replace(arch.moe, moe_ffn_hidden_size=3) if arch.moe else None
    sizes = {"num_layers": 1, "hidden_size": arch.num_attention_heads, "kv_channels": 2, "vocab_size": 300}
    return replace(arch, **sizes, ffn_hidden_size=3 * tp, moe=moe)


class Marked:
    """A checkpoint in which each row (of what is split by columns, each column) has a number of its own."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.shapes = shapes
        self.first = {name: 10_000.0 * i for i, name in enumerate(shapes)}

    def rows(self, name: str, start: int, count: int) -> list[float]:
        return [self.first[name] + start + i for i in range(count)]

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        shape, axis = self.shapes[name], dim or 0
        numbers = self.first[name] + torch.arange(shape[axis], dtype=torch.float32)
        whole = numbers.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
        return whole if dim is None else whole.narrow(dim, start, (stop or shape[dim]) - start)


def check_order(arch: Architecture, config: ParallelConfig, world_size: int) -> None:
    """Inside the fused parameters each row is where Megatron's forward pass looks for it."""
    table = NameTable(arch)
    marked = Marked(table.hf_tensors())
    shards: set[Shard] = set()
    for rank in range(world_size):
        with pretended_layout(rank, world_size, config) as layout:
            shards.add(layout.shard)
            if rank == 0:
                model = build_model(arch, ModelConfig(path="unread", dtype="float32"), config, layout.pg_collection)
    for shard in shards:
        load_hf(model, marked, table, shard)  # type: ignore[arg-type]
        check_rows(dict(global_parameters(model)), marked, arch, shard)


def check_rows(parameters: dict[str, Tensor], marked: Marked, arch: Architecture, shard: Shard) -> None:
    layer, hf = "decoder.layers.0.", "model.layers.0."
    d, queries = arch.kv_channels, arch.num_attention_heads // arch.num_query_groups
    groups = arch.num_query_groups // shard.tp_size
    for kind in ("weight", "bias") if arch.has("linear_qkv.bias") else ("weight",):
        wanted: list[float] = []
        for group in range(shard.tp_rank * groups, (shard.tp_rank + 1) * groups):
            attention = hf + "self_attn.{}_proj." + kind
            wanted += marked.rows(attention.format("q"), group * queries * d, queries * d)
            wanted += marked.rows(attention.format("k"), group * d, d)
            wanted += marked.rows(attention.format("v"), group * d, d)
        assert first_column(parameters[f"{layer}self_attention.linear_qkv.{kind}"]) == wanted
    if arch.moe is None:
        f = arch.ffn_hidden_size // shard.tp_size
        mlps = {"mlp.": ("mlp.", shard.tp_rank * f, f)}
    else:
        local = arch.moe.num_moe_experts // shard.ep_size
        mlps = {
            f"mlp.experts.local_experts.{i}.": (f"mlp.experts.{shard.ep_rank * local + i}.", 0, 3) for i in range(local)
        }
    for name, (hf_name, start, count) in mlps.items():
        wanted = [
            row for part in ("gate", "up") for row in marked.rows(f"{hf}{hf_name}{part}_proj.weight", start, count)
        ]
        assert first_column(parameters[f"{layer}{name}linear_fc1.weight"]) == wanted
        down = marked.rows(f"{hf}{hf_name}down_proj.weight", start, count)
        if arch.moe is None:  # split by columns
            assert parameters[f"{layer}{name}linear_fc2.weight"][0].tolist() == down


def first_column(parameter: Tensor) -> list[float]:
    return parameter.flatten(1)[:, 0].tolist() if parameter.dim() > 1 else parameter.tolist()
