"""Hugging Face files into a Megatron model of any layout; each rank reads only its slices."""

import torch
from torch import Tensor, nn

from megatron_opsd.conversion.hf_files import HFReader
from megatron_opsd.conversion.mapping import NameTable, Rule, Shard


def global_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of one pipeline stage, layers numbered as in the whole model, experts as on their rank."""
    offsets = {
        f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}."
        for i, layer in enumerate(model.get_submodule("decoder.layers"))  # type: ignore[arg-type]
    }

    def renumber(name: str) -> str:
        prefix = ".".join(name.split(".")[:3]) + "."
        return name.replace(prefix, offsets[prefix], 1) if prefix in offsets else name

    return [(renumber(name), parameter) for name, parameter in model.named_parameters()]


@torch.no_grad()
def load_hf(model: nn.Module, reader: HFReader, table: NameTable, shard: Shard) -> None:
    """Fill ``model`` (one rank's stage and shard) from a Hugging Face directory."""
    first_expert = shard.ep_rank * table.experts_per_rank(shard.ep_size)
    for name, parameter in global_parameters(model):
        rule = table.rule(name, first_expert)
        weight = rule.fuse([_read_slice(reader, rule, hf_name, shard, parameter) for hf_name in rule.hf])
        assert weight.shape == parameter.shape, (name, weight.shape, parameter.shape)
        parameter.copy_(weight)


def _read_slice(reader: HFReader, rule: Rule, hf_name: str, shard: Shard, target: Tensor) -> Tensor:
    if rule.dim is None:
        return reader.read(hf_name)
    whole = rule.hf[hf_name][rule.dim]
    size = target.shape[0] if rule.is_vocab else whole // shard.tp_size
    start, stop = min(shard.tp_rank * size, whole), min((shard.tp_rank + 1) * size, whole)
    rows = reader.read(hf_name, rule.dim, start, stop)
    if rule.is_vocab and stop - start < size:  # the padding at the vocabulary's end
        rows = torch.cat([rows, rows.new_zeros(size - (stop - start), rows.shape[1])])
    return rows
