"""The architectures of published sizes as in their config.json files, so that plans need no download."""

COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def _qwen3(h: int, f: int, layers: int, heads: int, groups: int, tied: bool) -> dict:
    return COMMON | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": h,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": tied,
    }


def _qwen3_moe(h: int, f: int, layers: int, heads: int, groups: int, moe_intermediate_size: int) -> dict:
    return _qwen3(h, f, layers, heads, groups, tied=False) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": moe_intermediate_size,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
    }


def _qwen2(h: int, f: int, layers: int, heads: int, groups: int, vocab: int, tied: bool) -> dict:
    return COMMON | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": h,
        "intermediate_size": f,
        "max_position_embeddings": 32768,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
    }


PUBLISHED = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, tied=False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, 8, tied=False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, 8, tied=False),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 4, 768),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 12288, 94, 64, 4, 1536),
    "Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, vocab=151936, tied=True),
    "Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, vocab=152064, tied=False),
}
