"""A Hugging Face architecture as Megatron's GPTModel: Transformer Engine layers on a GPU, local layers elsewhere."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opsd.compat.megatron_internals import GPTWithoutLogits, define_te_general_gemm
from megatron_opsd.config import ModelConfig, ParallelConfig
from megatron_opsd.data.batch import Sequences
from megatron_opsd.model import parallel
from megatron_opsd.weights.architecture import Architecture, MixtureOfExperts

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm whose weight tells Megatron to sum its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=parallel.device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPACoreAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention, for machines without Transformer Engine.

    Padded sequences have their padding on the right, where the causal mask keeps it out of every real position. Packed
    ones are computed one by one.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,  # [s, b, np, hn]; packed: [t, np, hn]
        key: Tensor,  # [s, b, ng, hn]; packed: [t, ng, hn]
        value: Tensor,  # as key
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert attention_mask is None, "the causal mask is the only one"
        if packed_seq_params is None:
            return self._attend(query, key, value)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*part) for part in parts])  # [t, 1, np*hn]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, np, s, hn]
        grouped = query.shape[2] != key.shape[2]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)  # [s, b, np*hn]


class HiddenStateGPT(GPTWithoutLogits):
    """GPTModel whose last stage returns hidden states, and which hands out the LM head to make logits of them."""

    def head_weight(self) -> Tensor:
        """This rank's rows of the LM head [v/tp, h]; only on the last stage."""
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        assert weight is not None, "this stage has no LM head"
        return weight

    def head_input(self, hidden_states: Tensor) -> Tensor:
        """Whole hidden states [s, b, h] for a vocabulary-parallel head.

        The backward pass sums the ranks' parts of the gradient, once; nothing else may.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(hidden_states)


class ModelChunks(torch.nn.ModuleList):
    """This rank's parts of a model in the order in which data pass them: one, or several of an interleaved pipeline."""

    def __iter__(self) -> Iterator[HiddenStateGPT]:
        return super().__iter__()  # type: ignore[return-value]

    @property
    def first(self) -> HiddenStateGPT:
        return self[0]  # type: ignore[return-value]

    @property
    def last(self) -> HiddenStateGPT:
        """The one that may end in the LM head."""
        return self[-1]  # type: ignore[return-value]

    @property
    def config(self) -> TransformerConfig:
        return self.first.config

    def head_weight(self) -> Tensor | None:
        """This rank's rows of the LM head [v/tp, h]; None on other stages than the last."""
        return self.last.head_weight() if self.last.post_process else None


def use_transformer_engine() -> bool:
    """Transformer Engine's layers need a GPU, and a package that Megatron could load."""
    return torch.cuda.is_available() and HAVE_TE


def layers_in_use() -> str:
    """Whose layers the models are built of, for the reader."""
    return "Transformer Engine" if use_transformer_engine() else "local"


def edge_stage_layers(num_layers: int, stages: int) -> tuple[int | None, int | None]:
    """Layers of the first and the last stage where they do not divide evenly; (None, None) where they do.

    The stages between get one size. The edges, which also hold the embedding and the head, get what is left.
    """
    if num_layers % stages == 0:
        return None, None
    between = -(-num_layers // stages)
    if num_layers - between * (stages - 2) < 2:
        between -= 1
    left = num_layers - between * (stages - 2)
    return left - left // 2, left // 2


def transformer_config(arch: Architecture, model: ModelConfig, layout: ParallelConfig) -> TransformerConfig:
    dtype = DTYPES[model.dtype]
    recompute = model.recompute == "full"
    first, last = edge_stage_layers(arch.num_layers, layout.pipeline_model_parallel_size)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=arch.has("self_attention.q_layernorm.weight"),
        add_qkv_bias=arch.has("self_attention.linear_qkv.bias"),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        perform_initialization=True,  # else Megatron does not mark shards, and the gradient norm misses ranks > 0
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,  # needs Apex; the head, the largest, has its own accumulation
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        calculate_per_token_loss=True,  # Megatron divides once, by the global count
        **(_moe_settings(arch.moe, layout) if arch.moe else {}),
    )


def _moe_settings(moe: MixtureOfExperts, layout: ParallelConfig) -> dict[str, Any]:
    """The part of Megatron's configuration that makes every MLP a mixture of experts, routed as `transformers` does."""
    return {
        "num_moe_experts": moe.num_moe_experts,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
        "moe_router_topk": moe.moe_router_topk,
        # The softmax of the chosen logits alone is the softmax of all, made to sum to 1 over the chosen.
        "moe_router_pre_softmax": not moe.norm_topk_prob,
        "moe_router_dtype": "fp32",
        # The student learns from the divergence alone: an auxiliary loss would also be scaled by the token count.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": use_transformer_engine(),
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


def _layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers, or Megatron's local ones with the parts above.

    Experts: TEGroupedMLP (one grouped product over a rank's experts) with Transformer Engine, SequentialMLP (one MLP
    after the other) without. Both hold a parameter for each expert and write the same checkpoints. Megatron's third,
    GroupedMLP, does neither, computes in bfloat16 only and needs the grouped_gemm package.
    """
    experts, qk_layernorm = config.num_moe_experts, config.qk_layernorm
    if use_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=qk_layernorm
        )
    define_te_general_gemm()
    layer = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=qk_layernorm, normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = SDPACoreAttention
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layers, layer_norm=RMSNorm)  # pyright: ignore[reportArgumentType]


def build_model(
    arch: Architecture, model: ModelConfig, layout: ParallelConfig, pg_collection: ProcessGroupCollection
) -> ModelChunks:
    """This rank's stage and shards, on its device, weights not yet loaded."""
    config = transformer_config(arch, model, layout)
    stage, stages = pg_collection.pp.rank(), pg_collection.pp.size()
    gpt = HiddenStateGPT(
        config,
        _layer_spec(config),  # pyright: ignore[reportArgumentType]
        vocab_size=arch.padded_vocab_size(layout.tensor_model_parallel_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,  # pyright: ignore[reportArgumentType]
        pg_collection=pg_collection,
    )
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            # Reduce gradients over the ranks that hold the same experts. Megatron says so itself only where they are
            # split over ranks; where they are not, tensor-parallel ranks, each with its own tokens, hold copies too.
            parameter.allreduce = False  # type: ignore[attr-defined]
    return ModelChunks([gpt])


def forward(model: torch.nn.Module, sequences: Sequences) -> Tensor:
    """What the stage makes of one side of a micro-batch, [s, b, h], or [s/tp, b, h] under sequence parallelism."""
    tokens, boundaries = sequences.tokens, sequences.boundaries
    # Of right-padded sequences; where they are packed, the boundaries say where the rotation starts again.
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    packed = None
    if boundaries is not None:
        longest = int(boundaries.diff().max())
        packed = PackedSeqParams("thd", boundaries, boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)
    return model(tokens, positions, None, packed_seq_params=packed)
