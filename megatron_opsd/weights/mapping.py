"""How a Megatron parameter is made of Hugging Face tensors, for one architecture and any rank's shard.

A rule works on the shards of one rank. ``fuse`` makes the Megatron shard from that rank's slices of the Hugging Face
tensors, and ``split`` is the inverse. A slice is the rank's equal part along ``dim``, so the whole Hugging Face tensor
is the concatenation of all tensor-parallel ranks' slices. The same table works for import, export and every layout.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opsd.weights.architecture import Architecture
from megatron_opsd.weights.tables import FAMILIES, Row

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Which shard of the model a rank holds. The names of its parameters show the pipeline stage."""

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1


@dataclass(frozen=True)
class Rule:
    """A row of a family's table for one parameter, with the names filled in and the shapes as numbers.

    dim: the dimension that tensor parallelism splits; None if every rank holds the whole tensor.
    group_rows: rows of each tensor in one query group; None if the tensors (of equal size) follow one another.
    is_vocab: the rows are vocabulary entries, padded at the end with zeros.
    is_expert: each expert-parallel rank holds another expert under the same Megatron name.
    """

    megatron: str
    hf: dict[str, Shape]
    dim: int | None
    group_rows: tuple[int, ...] | None
    is_vocab: bool
    is_expert: bool

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """The rank's Megatron shard, from its slices of the Hugging Face tensors."""
        if len(parts) == 1:
            return parts[0]
        rows = self.group_rows or [len(part) for part in parts]
        groups = [part.unflatten(0, (-1, n)) for part, n in zip(parts, rows, strict=True)]  # [groups, n, ...]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(self, weight: Tensor) -> list[Tensor]:
        """The rank's slices of the Hugging Face tensors, from its Megatron shard."""
        rows = self.group_rows or [len(weight) // len(self.hf)] * len(self.hf)
        groups = weight.unflatten(0, (-1, sum(rows)))
        return [part.flatten(0, 1) for part in groups.split(list(rows), dim=1)]


class NameTable:
    """Looks up the rule of a Megatron parameter and lists the Hugging Face tensors of a whole model."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        heads, groups, d = arch.num_attention_heads, arch.num_query_groups, arch.kv_channels
        self._group_rows = (heads // groups * d, d, d)  # of q, k, v
        self._sizes = {"h": arch.hidden_size, "v": arch.vocab_size, "q": heads * d, "k": groups * d, "d": d}
        if arch.moe is None:
            self._sizes |= {"f": arch.ffn_hidden_size}
        else:
            self._sizes |= {"e": arch.moe.num_moe_experts, "m": arch.moe.moe_ffn_hidden_size}
        self._rows = [
            (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(name))), row)
            for row in FAMILIES[arch.family]
            for name in (row.megatron, row.transformer_engine)
            if name is not None
        ]

    def experts_per_rank(self, ep_size: int) -> int:
        return self.arch.moe.num_moe_experts // ep_size if self.arch.moe else 0

    def rule(self, megatron_name: str, first_expert: int = 0) -> Rule:
        """The rule of a parameter.

        megatron_name: with the layer's number in the whole model and the expert's number on its rank.
        first_expert: the number in the whole model of that rank's first expert.
        """
        for pattern, row in self._rows:
            if match := pattern.fullmatch(megatron_name):
                numbers = {key: int(number) for key, number in match.groupdict().items()}
                numbers["expert"] = first_expert + numbers.get("expert", 0)
                return self._rule(megatron_name, row, numbers)
        raise KeyError(megatron_name)

    def _rule(self, megatron_name: str, row: Row, numbers: dict[str, int]) -> Rule:
        is_vocab = any(shape.startswith("v") for shape in row.hf.values())
        names = row.hf
        if megatron_name == "output_layer.weight" and self.arch.share_embeddings_and_output_weights:
            names = {"model.embed_tokens.weight": "vh"}  # the last pipeline stage's copy
        return Rule(
            megatron_name,
            {name.format(**numbers): self._shape(shape) for name, shape in names.items()},
            row.dim,
            self._group_rows if row.by_query_group else None,
            is_vocab=is_vocab,
            is_expert="{expert}" in row.megatron,
        )

    def _shape(self, letters: str) -> Shape:
        return tuple(self._sizes[letter] for letter in letters)

    def hf_tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the Hugging Face checkpoint, layer by layer."""
        shapes = {name: self._shape(shape) for row in FAMILIES[self.arch.family] for name, shape in row.hf.items()}
        if self.arch.share_embeddings_and_output_weights:
            del shapes["lm_head.weight"]
        in_layers = {name: shape for name, shape in shapes.items() if "{layer}" in name}
        tensors = {name: shape for name, shape in shapes.items() if name not in in_layers}
        for layer in range(self.arch.num_layers):
            for name, shape in in_layers.items():
                experts = range(self._sizes["e"]) if "{expert}" in name else (0,)
                tensors |= {name.format(layer=layer, expert=expert): shape for expert in experts}
        return tensors
