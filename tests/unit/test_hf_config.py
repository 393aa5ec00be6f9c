"""What config.json may say. What it must not is in bad_inputs/model_files.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from megatron_opsd.weights.architecture import published_architecture, read_architecture
from megatron_opsd.weights.hf_config import HFConfig
from megatron_opsd.weights.published import PUBLISHED
from megatron_opsd.weights.tables import FAMILIES
from tests.distributed.tiny import FAMILY_SHAPE, SHAPE

# What published files have beside the keys of published.py.
CODER = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True, "norm_topk_prob": True}
OLD = {"use_mrope": False, "torch_dtype": "bfloat16", "sliding_window": 4096, "use_sliding_window": False}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_files_are_read(size: str, tmp_path: Path) -> None:
    path = write(tmp_path, PUBLISHED[size])
    assert read_architecture(path) == published_architecture(size)
    theirs = AutoConfig.from_pretrained(path)
    assert read_architecture(path).rotary_base == theirs.rope_parameters["rope_theta"]
    theirs.save_pretrained(tmp_path)  # what transformers makes of it says the same
    assert read_architecture(tmp_path) == published_architecture(size)


@pytest.mark.parametrize(("size", "more"), [("Qwen3-30B-A3B", CODER), ("Qwen2.5-1.5B", OLD)])
def test_keys_of_other_published_files_say_nothing_new(size: str, more: dict[str, Any], tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, PUBLISHED[size] | more)) == published_architecture(size)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_omits_is_what_transformers_takes(family: str, tmp_path: Path) -> None:
    required = {name for name, field in HFConfig.model_fields.items() if field.is_required()}
    required |= {"num_experts", "num_experts_per_tok", "moe_intermediate_size"} if family == "qwen3_moe" else set()
    shape = SHAPE | FAMILY_SHAPE[family]
    least = {name: shape[name] for name in required - {"model_type"}}
    path = write(tmp_path, {"model_type": family, **least})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    ours, theirs = read_architecture(path), model.config
    assert ours.kv_channels == model.model.layers[0].self_attn.head_dim
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.layernorm_epsilon == theirs.rms_norm_eps
    assert ours.share_embeddings_and_output_weights == theirs.tie_word_embeddings
    assert ours.moe is None or ours.moe.norm_topk_prob == theirs.norm_topk_prob


def test_every_key_of_transformers_base_is_known(tmp_path: Path) -> None:
    """A program that writes all keys, and not only those that differ, writes these too."""
    base = PreTrainedConfig().to_dict() | {"model_type": "qwen3"}
    assert read_architecture(write(tmp_path, PUBLISHED["Qwen3-8B"] | base)) == published_architecture("Qwen3-8B")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {}, "rope_theta": 5.0},
        {"rope_scaling": {"type": "default", "factor": None}, "rope_theta": 5.0},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5}, "rope_theta": 5.0},
        {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 1.0}, "rope_theta": 5.0},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}, "rope_theta": 5},
        {"final_logit_softcapping": None, "rope_theta": 5.0},
    ],
)
def test_the_base_of_the_rope_is_that_of_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, PUBLISHED["Qwen3-8B"] | change)
    assert read_architecture(path).rotary_base == AutoConfig.from_pretrained(path).rope_parameters["rope_theta"] == 5.0
