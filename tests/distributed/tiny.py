"""Tiny checkpoints of each family with random weights, and micro-batches of fixed random rollouts."""

import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_opsd.data.batch import Sample
from megatron_opsd.types import Rollout

VOCAB = 500  # no multiple of 128 * TP: the shards are padded

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
FAMILY_SHAPE = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
}


def write_model(path: Path, family: str, tied: bool, seed: int = 0, **overrides: object) -> Path:
    """A Hugging Face directory of a model with four layers and weights large enough to matter."""
    torch.manual_seed(seed)
    shape = SHAPE | FAMILY_SHAPE[family] | overrides
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, tie_word_embeddings=tied))
    for parameter in model.parameters():
        mean, std = (1.0, 0.2) if parameter.dim() == 1 else (0.0, 0.1)
        torch.nn.init.normal_(parameter, mean, std)
    model.save_pretrained(path)
    return path


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts and responses of many lengths, as if a student had sampled them."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(low, high))]

    samples = []
    for i in range(count):
        response = tokens(1, 9)
        logprobs = [-draw.random() for _ in response]
        samples.append(
            Sample(tokens(2, 7), tokens(5, 15), Rollout(response, logprobs, "stop", 0), advantage=i % 3 - 0.5)
        )
    return samples
