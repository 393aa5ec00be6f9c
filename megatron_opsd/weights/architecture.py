"""What a Hugging Face config.json says about a model, under Megatron's names."""

from dataclasses import dataclass
from pathlib import Path

from megatron_opsd.errors import UserError
from megatron_opsd.files import check_folder, read_json
from megatron_opsd.weights.hf_config import HFConfig
from megatron_opsd.weights.published import PUBLISHED
from megatron_opsd.weights.tables import FAMILIES


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


def read_architecture(path: str | Path) -> Architecture:
    """Read ``path``/config.json.

    Raises:
        UserError: the file is missing or broken, or asks for something that our models do not compute.
    """
    check_folder(Path(path), "model.path must be a local Hugging Face checkpoint")
    return _from(read_json(Path(path, "config.json"), HFConfig, "correct it or choose another model"))


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
    return _from(HFConfig.model_validate(PUBLISHED[name]))


def _from(config: HFConfig) -> Architecture:
    return Architecture(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.kv_channels,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rotary_base=config.rotary_base,
        layernorm_epsilon=config.rms_norm_eps,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        moe=_moe(config) if config.model_type == "qwen3_moe" else None,
    )


def _moe(config: HFConfig) -> MixtureOfExperts:
    assert config.moe_intermediate_size  # required of this family
    assert config.num_experts_per_tok
    return MixtureOfExperts(
        num_moe_experts=config.num_moe_experts,
        moe_ffn_hidden_size=config.moe_intermediate_size,
        moe_router_topk=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
    )
