"""The keys of a Hugging Face config.json, each with the values that we can compute.

A key is a field of HFConfig, one of HARMLESS, or unknown. An unknown key is refused, because it may ask for something
that our models do not compute, and the run would train another model than the one that the files hold.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_opsd.files import excerpt
from megatron_opsd.weights.tables import FAMILIES

Size = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(gt=0, le=1024)]  # of layers or experts, whose names the files are checked for
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]

# Keys without an effect on what these families compute.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_window_layers",  # read only with use_sliding_window
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "sliding_window",  # read only with use_sliding_window
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

# Of the generation, which transformers 4 wrote here too.
HARMLESS |= {
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}

# Keys that transformers does not read for these families and some files have, with the value that says nothing new.
NEUTRAL = {
    "add_cross_attention": False,
    "is_causal": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "pruned_heads": {},
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "use_bfloat16": False,
    "use_mrope": False,
    "use_qk_norm": True,
}

_MOE_SIZES = ("moe_intermediate_size", "num_experts_per_tok")


class Rope(BaseModel):
    """``rope_parameters``, or ``rope_scaling`` as it is called in files of transformers 4."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: Positive | None = None
    partial_rotary_factor: One = 1.0

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, raw: Any) -> Any:
        return {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else raw


class HFConfig(BaseModel):
    """A config.json. What it may omit has the value that transformers gives it then."""

    model_config = ConfigDict(strict=True, frozen=True)

    model_type: str
    architectures: list[str] | None = None
    num_hidden_layers: Count
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None = None
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: Positive = 10_000.0
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    partial_rotary_factor: One | None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    attention_dropout: Zero = 0.0
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None
    decoder_sparse_step: Literal[1] = 1
    mlp_only_layers: Annotated[list[int], Field(max_length=0)] | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    moe_intermediate_size: Size | None = None
    num_experts_per_tok: Size | None = None
    norm_topk_prob: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "model_type" not in raw:
            return raw  # pydantic says what is missing
        for key in ("text_config", "llm_config", "vision_config"):
            if raw.get(key) is not None:
                raise ValueError(f"{key}: a model of more than text is not supported")
        if raw["model_type"] not in list(FAMILIES):
            raise ValueError(_unsupported("model_type", raw["model_type"], ", ".join(map(repr, FAMILIES))))
        if quantization := raw.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ValueError(f"quantization_config ({excerpt(method)}): the model is quantised; use the original")
        if raw.get("auto_map") is not None:
            raise ValueError("auto_map: the model brings code of its own, which is not run")
        known = cls.model_fields.keys() | HARMLESS
        for key, value in raw.items():
            if key not in known and value is not None and not _is_neutral(key, value):
                name = key if key.isidentifier() else excerpt(key)
                raise ValueError(
                    f"{name} = {excerpt(value)}: is not known here and may change what the model computes; remove the "
                    "key if it does not"
                )
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.architectures not in (None, [], [self.class_name]):
            raise ValueError(_unsupported("architectures", self.architectures, repr([self.class_name])))
        if self.attention_bias and self.model_type != "qwen2":  # Qwen2's files are checked for their biases
            raise ValueError(_unsupported("attention_bias", True, "False"))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads}: must be a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries: must be num_hidden_layers = {self.num_hidden_layers}"
            )
        self._check_head_dim()
        self._check_rope_theta()
        self._check_moe()
        return self

    def _check_head_dim(self) -> None:
        if self.head_dim is None and "head_dim" in self.model_fields_set and self.model_type != "qwen2":
            raise ValueError("head_dim = None: must be a number")  # not the default: transformers fails at it
        in_hidden, rest = divmod(self.hidden_size, self.num_attention_heads)
        if self.head_dim is None and self.model_type != "qwen3" and rest:
            raise ValueError(
                f"hidden_size = {self.hidden_size}: must be a multiple of num_attention_heads = "
                f"{self.num_attention_heads} where there is no head_dim"
            )
        if self.model_type == "qwen2" and self.head_dim not in (None, in_hidden):
            raise ValueError(_unsupported("head_dim", self.head_dim, "hidden_size / num_attention_heads"))
        if self.kv_channels % 2:
            raise ValueError(f"head_dim = {self.kv_channels}: must be even")

    def _check_rope_theta(self) -> None:
        places: dict[str, Any] = {"rope_scaling.rope_theta": self.rope_scaling and self.rope_scaling.rope_theta}
        places["rope_parameters.rope_theta"] = self.rope_parameters and self.rope_parameters.rope_theta
        places["rope_theta"] = self.rope_theta if "rope_theta" in self.model_fields_set else None
        for place, value in places.items():
            if value not in (None, self.rotary_base):
                raise ValueError(
                    f"{place} = {value}: contradicts the rope_theta of {self.rotary_base} that is read first"
                )

    def _check_moe(self) -> None:
        given = [name for name in ("num_experts", "num_local_experts", *_MOE_SIZES) if getattr(self, name) is not None]
        if self.model_type != "qwen3_moe":
            if given:
                raise ValueError(f"{given[0]} = {getattr(self, given[0])}: {self.model_type} has no experts")
            return
        if None not in (self.num_experts, self.num_local_experts) and self.num_experts != self.num_local_experts:
            raise ValueError(
                f"num_experts = {self.num_experts}: contradicts num_local_experts = {self.num_local_experts}"
            )
        for name in ("num_experts", *_MOE_SIZES):
            if name not in given and (name, "num_local_experts" in given) != ("num_experts", True):
                raise ValueError(f"the key {name} is missing")
        chosen = self.num_experts_per_tok or 0
        if chosen > self.num_moe_experts:
            raise ValueError(f"num_experts_per_tok = {chosen}: there are only {self.num_moe_experts} experts")
        if self.norm_topk_prob and chosen == 1:  # the only weight would always be 1: the router cannot learn
            raise ValueError(_unsupported("num_experts_per_tok", 1, "2 or more where norm_topk_prob is true"))

    @property
    def class_name(self) -> str:
        """Of the model in transformers and vLLM."""
        return "".join(part.capitalize() for part in self.model_type.split("_")) + "ForCausalLM"

    @property
    def kv_channels(self) -> int:
        """The size of a head."""
        if self.head_dim is not None:
            return self.head_dim
        return 128 if self.model_type == "qwen3" else self.hidden_size // self.num_attention_heads

    @property
    def rotary_base(self) -> float:
        """``rope_theta``, from the place that transformers takes it from."""
        rope = self.rope_scaling if self.rope_scaling and self.rope_scaling.model_fields_set else self.rope_parameters
        return (rope and rope.rope_theta) or self.rope_theta

    @property
    def num_moe_experts(self) -> int:
        """transformers 5 writes ``num_local_experts``, and the published files have ``num_experts``."""
        return self.num_local_experts or self.num_experts or 0


def _is_neutral(key: str, value: Any) -> bool:
    neutral = NEUTRAL.get(key)
    return type(value) is type(neutral) and value == neutral  # `1 == True` in Python


def _unsupported(key: str, value: Any, supported: str) -> str:
    return f"{key} = {excerpt(value)} is not supported (supported: {supported})"
