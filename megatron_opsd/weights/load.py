"""Loads Hugging Face files into a Megatron model of any layout; a rank reads only its slices."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.mapping import NameTable, Rule, Shard


def global_parameters(model_chunks: Iterable[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of one rank. Layers have their number in the whole model, experts that on their rank."""
    return [named for chunk in model_chunks for named in _of_chunk(chunk)]


def _of_chunk(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    offsets = {
        f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}."
        for i, layer in enumerate(model.get_submodule("decoder.layers"))  # type: ignore[arg-type]
    }

    def renumber(name: str) -> str:
        prefix = ".".join(name.split(".")[:3]) + "."
        return name.replace(prefix, offsets[prefix], 1) if prefix in offsets else name

    return [(renumber(name), parameter) for name, parameter in model.named_parameters()]


@torch.no_grad()
def load_hf(
    model_chunks: Iterable[nn.Module],
    reader: HFReader,
    table: NameTable,
    shard: Shard,
    dp_group: dist.ProcessGroup | None = None,
    expert_dp_group: dist.ProcessGroup | None = None,
) -> None:
    """Fill ``model_chunks`` (one rank's stage and shard) from a Hugging Face directory.

    dp_group, expert_dp_group: the ranks that hold the same parameters, or the same experts. If given, the first rank of
    a group reads and broadcasts to the others, so that the cluster reads each slice only once.
    """
    first_expert = shard.ep_rank * table.experts_per_rank(shard.ep_size)
    for name, parameter in global_parameters(model_chunks):
        rule = table.rule(name, first_expert)
        group = expert_dp_group if rule.is_expert else dp_group
        if group is None or group.rank() == 0:
            weight = rule.fuse([_read_slice(reader, rule, hf_name, shard, parameter) for hf_name in rule.hf])
            assert weight.shape == parameter.shape, (name, weight.shape, parameter.shape)
            parameter.copy_(weight)
        if group is not None and group.size() > 1:
            dist.broadcast(parameter, group_src=0, group=group)


def _read_slice(reader: HFReader, rule: Rule, hf_name: str, shard: Shard, target: Tensor) -> Tensor:
    if rule.dim is None:
        return reader.read(hf_name)
    whole = rule.hf[hf_name][rule.dim]
    size = target.shape[0] if rule.is_vocab else whole // shard.tp_size
    start, stop = min(shard.tp_rank * size, whole), min((shard.tp_rank + 1) * size, whole)
    rows = reader.read(hf_name, rule.dim, start, stop)
    if rule.is_vocab and stop - start < size:  # padding at the end of the vocabulary
        rows = torch.cat([rows, rows.new_zeros(size - (stop - start), rows.shape[1])])
    return rows
