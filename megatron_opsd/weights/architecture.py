"""What a Hugging Face config.json says about a model, under Megatron's names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opsd.errors import UserError
from megatron_opsd.weights.published import PUBLISHED
from megatron_opsd.weights.tables import FAMILIES

# Features that our models do not implement, each with its only supported value; other values are refused.
_SUPPORTED = {
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@dataclass(frozen=True)
class MixtureOfExperts:
    """What replaces the MLP of every layer."""

    num_moe_experts: int
    moe_ffn_hidden_size: int
    moe_router_topk: int
    norm_topk_prob: bool
    """The weights of a token's experts are normalized to sum to 1."""


@dataclass(frozen=True)
class Architecture:
    """A decoder of one of the families in tables.py."""

    family: str
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
    moe: MixtureOfExperts | None

    def has(self, megatron_name: str) -> bool:
        """Whether the family's table has a parameter whose name ends with ``megatron_name``."""
        return any(row.megatron.endswith(megatron_name) for row in FAMILIES[self.family])

    def padded_vocab_size(self, tp_size: int) -> int:
        """The vocabulary rounded up so that every tensor-parallel rank holds a multiple of 128 rows."""
        multiple = 128 * tp_size
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class _ConfigFile:
    """A config.json. Reading a missing field raises a UserError that names it."""

    file: Path
    raw: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if self.raw.get(name) is None:
            raise UserError(f"{self.file}: the field {name} is missing")
        return self.raw[name]

    def refuse(self, name: str, supported: str) -> UserError:
        return UserError(
            f"{self.file}: {name} = {self.raw[name]!r} is not supported (supported: {supported}); choose another model"
        )


def read_architecture(path: str | Path) -> Architecture:
    """Read ``path``/config.json.

    Raises:
        UserError: the file or a field is missing, or the architecture has a feature that is not supported.
    """
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such directory; model.path must be a local Hugging Face checkpoint")
    if not file.is_file():
        raise UserError(f"{file}: not found; model.path must be a Hugging Face checkpoint with a config.json")
    return _parse(_ConfigFile(file, json.loads(file.read_text())))


def published_architecture(path: str) -> Architecture:
    """The architecture of a published model, found by the last part of its path or id (``Qwen/Qwen3-32B``).

    It needs no files.

    Raises:
        UserError: not the name of a model in published.py.
    """
    name = Path(path).name
    if name not in PUBLISHED:
        raise UserError(
            f"{path}: holds no config.json, and {name!r} is not one of {', '.join(PUBLISHED)}; "
            "put the model's config.json there, or name one of these"
        )
    return _parse(_ConfigFile(Path(name, "config.json"), PUBLISHED[name]))


def _parse(config: _ConfigFile) -> Architecture:
    if config["model_type"] not in FAMILIES:
        raise config.refuse("model_type", ", ".join(map(repr, FAMILIES)))
    for name, supported in _SUPPORTED.items():
        if (config.raw.get(name) or supported) != supported:
            raise config.refuse(name, repr(supported))
    rope = config.raw.get("rope_parameters") or config.raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{config.file}: rope type {kind!r} is not supported; supported: 'default'")
    heads, family = config["num_attention_heads"], config["model_type"]
    return Architecture(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"],
        # Qwen2's files have no head_dim: its heads divide the hidden size.
        kv_channels=config["hidden_size"] // heads if family == "qwen2" else config["head_dim"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rotary_base=rope.get("rope_theta") or config["rope_theta"],
        layernorm_epsilon=config["rms_norm_eps"],
        share_embeddings_and_output_weights=config.raw.get("tie_word_embeddings", False),
        moe=_read_moe(config) if family == "qwen3_moe" else None,
    )


def _read_moe(config: _ConfigFile) -> MixtureOfExperts:
    moe = MixtureOfExperts(
        # The published files have num_experts; transformers 5 writes it as num_local_experts.
        num_moe_experts=config.raw.get("num_local_experts") or config["num_experts"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_router_topk=config["num_experts_per_tok"],
        norm_topk_prob=config.raw.get("norm_topk_prob", False),
    )
    if moe.norm_topk_prob and moe.moe_router_topk == 1:  # the only weight would always be 1: the router cannot learn
        raise config.refuse("num_experts_per_tok", "2 or more where norm_topk_prob is true")
    return moe
