"""Tiny Qwen3 checkpoints with random weights, and micro-batches of fixed random rollouts."""

import random
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_opsd.batch import Sample
from megatron_opsd.types import Rollout

VOCAB = 500  # no multiple of 128 * TP: the shards are padded


def write_qwen3(path: Path, tied: bool, seed: int = 0, **overrides: object) -> Path:
    """A Hugging Face directory of a Qwen3 with four layers and weights large enough to matter."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = Qwen3Config(**{**shape, **overrides}, tie_word_embeddings=tied, rope_parameters=rope)
    model = Qwen3ForCausalLM(config)
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
    for _ in range(count):
        response = tokens(1, 9)
        logprobs = [-draw.random() for _ in response]
        samples.append(Sample(tokens(2, 7), tokens(5, 15), Rollout(response, logprobs, "stop", 0)))
    return samples
