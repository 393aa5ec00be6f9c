"""One table per model family: which Hugging Face tensors each Megatron parameter is made of.

This file has only names, shapes and splits; mapping.py applies them. docs/architecture.md shows how to add a family.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A Megatron parameter and the Hugging Face tensors that it contains.

    megatron: the parameter's name. ``{layer}`` is the layer's number in the whole model. ``{expert}`` is the expert's
        number in the whole model (in ``hf``) or among the rank's experts (in ``megatron``).
    hf: the tensors' names and whole shapes, in the order in which Megatron keeps their rows. A shape has a letter for
        each dimension: h hidden_size, v vocab_size, q and k the rows of all query heads and of all key (or value)
        heads, d head_dim, f intermediate_size, e num_experts, m moe_intermediate_size.
    dim: the dimension that tensor parallelism splits; None if every rank holds the whole parameter.
    by_query_group: Megatron keeps the rows of one query group together (its queries, its key, its value), then those
        of the next group. Otherwise the tensors follow one another, like the gate and up projections.
    transformer_engine: the name in Transformer Engine's layers, if it differs. These fuse a norm into the linear layer
        after it, and all of a rank's experts into one module.
    """

    megatron: str
    hf: dict[str, str]
    dim: int | None = None
    by_query_group: bool = False
    transformer_engine: str | None = None


_M, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."

_BACKBONE = (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vh"}, dim=0),
    Row(
        _M + "input_layernorm.weight",
        {_HF + "input_layernorm.weight": "h"},
        transformer_engine=_M + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Row(
        _M + "self_attention.linear_qkv.weight",
        {
            _HF + "self_attn.q_proj.weight": "qh",
            _HF + "self_attn.k_proj.weight": "kh",
            _HF + "self_attn.v_proj.weight": "kh",
        },
        dim=0,
        by_query_group=True,
    ),
    Row(_M + "self_attention.linear_proj.weight", {_HF + "self_attn.o_proj.weight": "hq"}, dim=1),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "h"}),
    Row("output_layer.weight", {"lm_head.weight": "vh"}, dim=0),
)

_QK_NORM = (
    Row(_M + "self_attention.q_layernorm.weight", {_HF + "self_attn.q_norm.weight": "d"}),
    Row(_M + "self_attention.k_layernorm.weight", {_HF + "self_attn.k_norm.weight": "d"}),
)

_QKV_BIAS = (
    Row(
        _M + "self_attention.linear_qkv.bias",
        {
            _HF + "self_attn.q_proj.bias": "q",
            _HF + "self_attn.k_proj.bias": "k",
            _HF + "self_attn.v_proj.bias": "k",
        },
        dim=0,
        by_query_group=True,
    ),
)

_MLP = (
    Row(
        _M + "pre_mlp_layernorm.weight",
        {_HF + "post_attention_layernorm.weight": "h"},
        transformer_engine=_M + "mlp.linear_fc1.layer_norm_weight",
    ),
    Row(
        _M + "mlp.linear_fc1.weight",
        {_HF + "mlp.gate_proj.weight": "fh", _HF + "mlp.up_proj.weight": "fh"},
        dim=0,
    ),
    Row(_M + "mlp.linear_fc2.weight", {_HF + "mlp.down_proj.weight": "hf"}, dim=1),
)

# Experts are distributed over the expert-parallel ranks and never split by tensor parallelism. Each expert has its own
# tensors in the files and in both of Megatron's modules (gpt.py chooses one), so its rows are those of a small MLP.
_EXPERTS = (
    Row(_M + "pre_mlp_layernorm.weight", {_HF + "post_attention_layernorm.weight": "h"}),
    Row(_M + "mlp.router.weight", {_HF + "mlp.gate.weight": "eh"}),
    Row(
        _M + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        {_HF + "mlp.experts.{expert}.gate_proj.weight": "mh", _HF + "mlp.experts.{expert}.up_proj.weight": "mh"},
        transformer_engine=_M + "mlp.experts.linear_fc1.weight{expert}",
    ),
    Row(
        _M + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        {_HF + "mlp.experts.{expert}.down_proj.weight": "hm"},
        transformer_engine=_M + "mlp.experts.linear_fc2.weight{expert}",
    ),
)

# By model_type of config.json.
FAMILIES: dict[str, tuple[Row, ...]] = {
    "qwen2": (*_BACKBONE, *_QKV_BIAS, *_MLP),
    "qwen3": (*_BACKBONE, *_QK_NORM, *_MLP),
    "qwen3_moe": (*_BACKBONE, *_QK_NORM, *_EXPERTS),
}
