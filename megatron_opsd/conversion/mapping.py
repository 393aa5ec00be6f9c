"""Which Hugging Face tensors each Megatron parameter holds, and how. One table per model family.

A rule works on one tensor-parallel rank's shards: ``fuse`` makes the Megatron shard from that rank's slices of the
Hugging Face tensors, ``split`` undoes it. A slice is the rank's even part along ``dim``, so the whole Hugging Face
tensor is the concatenation of all ranks' slices, and the same table serves import, export and every layout.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_opsd.conversion.architecture import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One row of a family's table.

    megatron: parameter name; ``{layer}`` stands for the layer's number in the whole model.
    hf: names (with the same ``{layer}``) and whole shapes of the tensors it is made of, in order.
    dim: dimension that tensor parallelism splits; None where every rank holds the whole.
    is_vocab: the rows are vocabulary entries, padded at the end with zeros.
    """

    megatron: str
    hf: dict[str, Shape]
    dim: int | None
    fuse: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    is_vocab: bool = False


def qwen3_rules(arch: Architecture) -> list[Rule]:
    """The table of dense Qwen3, for Megatron's local layers and for Transformer Engine's (norms fused into linears)."""
    h, f, d = arch.hidden_size, arch.ffn_hidden_size, arch.kv_channels
    q, kv = arch.num_attention_heads * d, arch.num_query_groups * d
    layer, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    embedding = _single("embedding.word_embeddings.weight", "model.embed_tokens.weight", (arch.vocab_size, h), 0)
    head = _single("output_layer.weight", "lm_head.weight", (arch.vocab_size, h), 0)
    if arch.share_embeddings_and_output_weights:
        head = replace(embedding, megatron="output_layer.weight")  # the last pipeline stage's copy
    attention_norm = {hf + "input_layernorm.weight": (h,)}
    mlp_norm = {hf + "post_attention_layernorm.weight": (h,)}
    return [
        replace(embedding, is_vocab=True),
        *[
            Rule(layer + name, attention_norm, None, _take_only, _give_only)
            for name in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        ],
        _query_key_value(
            layer + "self_attention.linear_qkv.weight",
            {
                hf + "self_attn.q_proj.weight": (q, h),
                hf + "self_attn.k_proj.weight": (kv, h),
                hf + "self_attn.v_proj.weight": (kv, h),
            },
            arch,
        ),
        _single(layer + "self_attention.q_layernorm.weight", hf + "self_attn.q_norm.weight", (d,), None),
        _single(layer + "self_attention.k_layernorm.weight", hf + "self_attn.k_norm.weight", (d,), None),
        _single(layer + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight", (h, q), 1),
        *[
            Rule(layer + name, mlp_norm, None, _take_only, _give_only)
            for name in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        ],
        Rule(
            layer + "mlp.linear_fc1.weight",
            {hf + "mlp.gate_proj.weight": (f, h), hf + "mlp.up_proj.weight": (f, h)},
            0,
            fuse=lambda parts: torch.cat(list(parts)),
            split=lambda weight: list(weight.chunk(2)),
        ),
        _single(layer + "mlp.linear_fc2.weight", hf + "mlp.down_proj.weight", (h, f), 1),
        _single("decoder.final_layernorm.weight", "model.norm.weight", (h,), None),
        replace(head, is_vocab=True),
    ]


class NameTable:
    """Looks up the rule of a Megatron parameter and lists the Hugging Face tensors of a whole model."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self._rules = {rule.megatron: rule for rule in qwen3_rules(arch)}

    def rule(self, megatron_name: str) -> Rule:
        """The rule of a parameter with its layer's number in the whole model, layer numbers filled in."""
        match = re.match(r"decoder\.layers\.(\d+)\.(.*)", megatron_name)
        if match is None:
            return self._rules[megatron_name]
        layer, rest = match.groups()
        rule = self._rules["decoder.layers.{layer}." + rest]
        hf = {name.replace("{layer}", layer): shape for name, shape in rule.hf.items()}
        return replace(rule, megatron=megatron_name, hf=hf)

    def hf_tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the Hugging Face checkpoint."""
        return {
            name.replace("{layer}", str(layer)): shape
            for rule in self._rules.values()
            for name, shape in rule.hf.items()
            for layer in (range(self.arch.num_layers) if "{layer}" in name else (0,))
        }


def _take_only(parts: Sequence[Tensor]) -> Tensor:
    (part,) = parts
    return part


def _give_only(weight: Tensor) -> list[Tensor]:
    return [weight]


def _single(megatron: str, hf: str, shape: Shape, dim: int | None) -> Rule:
    return Rule(megatron, {hf: shape}, dim, _take_only, _give_only)


def _query_key_value(megatron: str, hf: dict[str, Shape], arch: Architecture) -> Rule:
    """Megatron orders rows by query group: the group's queries, its key, its value, then the next group."""
    d = arch.kv_channels
    rows = [arch.num_attention_heads // arch.num_query_groups * d, d, d]  # of q, k, v in one group

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        groups = [part.unflatten(0, (-1, n)) for part, n in zip(parts, rows, strict=True)]  # [groups, n, h]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(weight: Tensor) -> list[Tensor]:
        groups = weight.unflatten(0, (-1, sum(rows)))
        return [part.flatten(0, 1) for part in groups.split(rows, dim=1)]

    return Rule(megatron, hf, 0, fuse, split)
