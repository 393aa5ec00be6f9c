"""A model's config.json."""

import json
from typing import Any

from . import Bad, Inputs

FILE = "{folder}/model/config.json: "
REMEDY = "correct it or choose another model"
MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
QWEN2 = {"model_type": "qwen2", "architectures": None, "head_dim": ...}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


def key(says: str, **keys: Any) -> Bad:
    """Keys of config.json are changed; ``...`` removes one."""
    what = ", ".join(f"{name}={value!r}" for name, value in keys.items())
    return Bad(what, [FILE + says, REMEDY], lambda inputs: inputs.config(**keys))


def contents(what: str, says: str, data: str | bytes) -> Bad:
    return Bad(what, [FILE + says], lambda inputs: inputs.write("model/config.json", data))


def with_bom(inputs: Inputs) -> None:
    file = inputs.model / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def folder(inputs: Inputs) -> None:
    (inputs.model / "config.json").unlink()
    (inputs.model / "config.json").mkdir()


BROKEN = [
    contents("empty", "is empty", ""),
    contents("blank", "is empty", " \n\n"),
    contents("cut", "not valid JSON", '{"architectures": ["Qwen3'),
    contents("a list", "must be a JSON object, this is list", "[]"),
    contents("null", "must be a JSON object, this is NoneType", "null"),
    contents("a number", "must be a JSON object, this is int", "3"),
    contents("an empty object", "the key model_type is missing", "{}"),
    contents("UTF-16", "is UTF-16; save it as UTF-8", "{}".encode("utf-16")),
    contents("Latin-1", "is not UTF-8", b'{"model_type": "\xe9"}'),
    contents("nested too deeply", "not valid JSON (nested too deeply)", '{"a":' * 99_999),
    contents("thousands of digits", "not valid JSON", '{"model_type": "qwen3", "hidden_size": 1' + "0" * 9999 + "}"),
    contents("a key of two lines", "'a\\nb' = 1: is not known here", json.dumps({"model_type": "qwen3", "a\nb": 1})),
    contents("a comment", "not valid JSON", '{"model_type": "qwen3" // ours\n}'),
    Bad("a byte order mark", [FILE, "byte order mark", "save it without"], with_bom),
    Bad("a folder", [FILE, "is a folder"], folder),
    Bad("no such file", [FILE, "no such file"], lambda i: (i.model / "config.json").unlink()),
    Bad("no such model", ["{folder}/none: no such directory"], settings={"model.path": "{folder}/none"}),
    Bad("a file as the model", ["run.toml: is a file"], settings={"model.path": "{folder}/run.toml"}),
    Bad("a name too long", ["no such directory"], settings={"model.path": "a" * 300}),
]

VALUES = [
    key("the key hidden_size is missing", hidden_size=...),
    key("the key num_hidden_layers is missing", num_hidden_layers=...),
    key("the key num_key_value_heads is missing", num_key_value_heads=...),
    key("num_hidden_layers = '3': Input should be a valid integer", num_hidden_layers="3"),
    key("num_hidden_layers = 3.0: Input should be a valid integer", num_hidden_layers=3.0),
    key("num_hidden_layers = True: Input should be a valid integer", num_hidden_layers=True),
    key("num_hidden_layers = 1000000000: Input should be less than", num_hidden_layers=10**9),
    key("hidden_size = None: Input should be a valid integer", hidden_size=None),
    key("hidden_size = -128: Input should be greater than 0", hidden_size=-128),
    key("vocab_size = 0: Input should be greater than 0", vocab_size=0),
    key("rms_norm_eps = '1e-6': Input should be a valid number", rms_norm_eps="1e-6"),
    key("rms_norm_eps = 0: Input should be greater than 0", rms_norm_eps=0),
    key("rms_norm_eps = nan: Input should be", rms_norm_eps=float("nan")),
    key("tie_word_embeddings = 'true': Input should be a valid boolean", tie_word_embeddings="true"),
    key("tie_word_embeddings = None: Input should be a valid boolean", tie_word_embeddings=None),
    key("head_dim = None: must be a number", head_dim=None),
    key("head_dim = 33: must be even", head_dim=33),
    key("num_attention_heads = 4: must be a multiple of num_key_value_heads = 3", num_key_value_heads=3),
    key("num_attention_heads = 4: must be a multiple of num_key_value_heads = 8", num_key_value_heads=8),
    key("head_dim = 64 is not supported", model_type="qwen2", architectures=None, head_dim=64),
    key("hidden_size = 130: must be a multiple of num_attention_heads = 4", hidden_size=130, **QWEN2),
]

OTHER_MODELS = [
    key("model_type = 'llama' is not supported (supported: 'qwen2', 'qwen3', 'qwen3_moe')", model_type="llama"),
    key("model_type = ['qwen3'] is not supported", model_type=["qwen3"]),
    key("the key model_type is missing", model_type=...),
    key("text_config: a model of more than text", model_type="qwen3_vl", text_config={"model_type": "qwen3"}),
    key("architectures = ['Qwen3Model'] is not supported", architectures=["Qwen3Model"]),
    key("architectures = ['Qwen3ForSequenceClassification']", architectures=["Qwen3ForSequenceClassification"]),
    key("auto_map: the model brings code", auto_map={"AutoModelForCausalLM": "modeling.Ours"}),
    key("quantization_config ('fp8')", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
    key("quantization_config ('gptq')", quantization_config={"quant_method": "gptq", "bits": 4}),
    key("quantization_config (None)", quantization_config={"load_in_4bit": True}),
    key("hidden_act = 'gelu': Input should be 'silu'", hidden_act="gelu"),
    key("attention_bias = True is not supported", attention_bias=True),
    key("attention_dropout = 0.1: Input should be", attention_dropout=0.1),
    key("mlp_bias = True: is not known here", mlp_bias=True),
    key("qkv_bias = True: is not known here", qkv_bias=True),
    key("use_qk_norm = False: is not known here", use_qk_norm=False),
    key("is_causal = False: is not known here", is_causal=False),
    key("final_logit_softcapping = 30.0: is not known here", final_logit_softcapping=30.0),
    key("attn_logit_softcapping = 50.0: is not known here", attn_logit_softcapping=50.0),
    key("dual_chunk_attention_config = ", dual_chunk_attention_config={"chunk_size": 262144}),
    key("embedding_multiplier = 12.0: is not known here", embedding_multiplier=12.0),
    key("use_sliding_window = True: Input should be False", use_sliding_window=True, sliding_window=4096),
    key("layer_types.1 = 'sliding_attention'", layer_types=["full_attention", "sliding_attention", "full_attention"]),
    key("layer_types has 2 entries: must be num_hidden_layers = 3", layer_types=["full_attention"] * 2),
]

ROPE = [
    key("rope_scaling.rope_type = 'yarn': Input should be 'default'", rope_scaling=YARN),
    key("rope_parameters.rope_type = 'yarn': Input should be 'default'", rope_parameters=YARN),
    key("rope_scaling.type = 'linear': Input should be 'default'", rope_scaling={"type": "linear", "factor": 2.0}),
    key("rope_scaling.type = 'dynamic'", rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}),
    key("rope_scaling.factor = 2.0: Extra inputs", rope_scaling={"type": "default", "factor": 2.0}),
    key("rope_scaling.mrope_section", rope_scaling={"rope_type": "default", "mrope_section": [16, 24, 24]}),
    key("rope_scaling = 'yarn': Input should be a valid dictionary", rope_scaling="yarn"),
    key("rope_parameters.full_attention = ", rope_parameters={"full_attention": {"rope_type": "default"}}),
    key("rope_parameters.partial_rotary_factor = 0.5", rope_parameters={"partial_rotary_factor": 0.5}),
    key("partial_rotary_factor = 0.5", partial_rotary_factor=0.5),
    key("rope_theta = 1000000.0: contradicts the rope_theta of 10000.0", rope_theta=1_000_000.0),
    key("rope_parameters.rope_theta = 10000.0: contradicts the rope_theta of 5.0", rope_scaling={"rope_theta": 5.0}),
    key("rope_theta = None: Input should be a valid number", rope_theta=None, rope_parameters=...),
    key("rope_theta = '10000': Input should be a valid number", rope_theta="10000"),
    key("rope_theta = -1.0: Input should be greater than 0", rope_theta=-1.0),
]

EXPERTS = [
    key("num_experts = 8: qwen3 has no experts", num_experts=8),
    key("the key num_experts is missing", **MOE | {"num_experts": None}),
    key("the key moe_intermediate_size is missing", **MOE | {"moe_intermediate_size": None}),
    key("the key num_experts_per_tok is missing", **MOE | {"num_experts_per_tok": ...}),
    key("num_experts = 8: contradicts num_local_experts = 4", **MOE, num_local_experts=4),
    key("num_experts_per_tok = 9: there are only 8 experts", **MOE | {"num_experts_per_tok": 9}),
    key("num_experts_per_tok = 0: Input should be greater than 0", **MOE | {"num_experts_per_tok": 0}),
    key("num_experts_per_tok = 1 is not supported", **MOE | {"num_experts_per_tok": 1}, norm_topk_prob=True),
    key("norm_topk_prob = 1: Input should be a valid boolean", **MOE, norm_topk_prob=1),
    key("decoder_sparse_step = 2: Input should be 1", **MOE, decoder_sparse_step=2),
    key("mlp_only_layers = [0]: List should have at most 0 items", **MOE, mlp_only_layers=[0]),
    key("shared_expert_intermediate_size = 64: is not known here", **MOE, shared_expert_intermediate_size=64),
    key("n_shared_experts = 1: is not known here", **MOE, n_shared_experts=1),
]

ROWS = [*BROKEN, *VALUES, *OTHER_MODELS, *ROPE, *EXPERTS]
