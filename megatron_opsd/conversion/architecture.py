"""What a Hugging Face config.json says about a model, in Megatron's words."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opsd.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A dense Qwen3 decoder."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    layernorm_epsilon: float
    share_embeddings_and_output_weights: bool

    def padded_vocab_size(self, tp_size: int) -> int:
        """The vocabulary rounded up so that every tensor-parallel rank holds a multiple of 128 rows."""
        multiple = 128 * tp_size
        return -(-self.vocab_size // multiple) * multiple


def read_architecture(path: str | Path) -> Architecture:
    """Read ``path``/config.json.

    Raises:
        UserError: no such file, a field missing, or a feature of the architecture that is not supported.
    """
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such directory; model.path must be a local Hugging Face checkpoint")
    if not file.is_file():
        raise UserError(f"{file}: not found; model.path must be a Hugging Face checkpoint with a config.json")
    raw = json.loads(file.read_text())

    def get(name: str) -> Any:
        if raw.get(name) is None:
            raise UserError(f"{file}: the field {name} is missing")
        return raw[name]

    if get("model_type") != "qwen3":
        raise UserError(f"{file}: model_type is {raw['model_type']!r}; supported: 'qwen3'")
    unsupported = {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    for name, supported in unsupported.items():
        if raw.get(name, supported) != supported:
            raise UserError(f"{file}: {name} = {raw[name]!r} is not supported; supported: {supported!r}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{file}: rope type {kind!r} is not supported; supported: 'default'")
    return Architecture(
        num_layers=get("num_hidden_layers"),
        hidden_size=get("hidden_size"),
        ffn_hidden_size=get("intermediate_size"),
        num_attention_heads=get("num_attention_heads"),
        num_query_groups=get("num_key_value_heads"),
        kv_channels=get("head_dim"),
        vocab_size=get("vocab_size"),
        max_position_embeddings=get("max_position_embeddings"),
        rotary_base=rope.get("rope_theta") or get("rope_theta"),
        layernorm_epsilon=get("rms_norm_eps"),
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", False),
    )
