"""What the two engines have in common: vLLM's environment and its arguments.

This module imports vLLM nowhere but inside functions, so that the environment is there first.
"""

import os
from typing import Any

import torch

from megatron_opsd.config import Config
from megatron_opsd.rollout.engine import Sampling


def prepare_environment() -> None:
    """What vLLM reads from the environment while it is imported; values the user has set stay.

    The one place where the project sets variables for vLLM.
    """
    settings = {"VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def engine_arguments(config: Config, max_model_len: int) -> dict[str, Any]:
    """vLLM's engine arguments wherever the engine lives. Its weights are random: refit before the first token."""
    rollout = config.rollout
    on_gpu = torch.cuda.is_available()
    return {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "load_format": "dummy",
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "max_model_len": max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager or not on_gpu,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if on_gpu else int(rollout.kv_cache_gib * 2**30),
        "enable_chunked_prefill": None if on_gpu else False,  # it rewinds seeded generators, which the CPU's cannot
        "max_num_batched_tokens": None if on_gpu else max(max_model_len, 8192),
        "seed": config.train.seed,
        "disable_log_stats": True,
    }


def sampling_arguments(sampling: Sampling, seed: int) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for one response."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "logprobs": 0,  # of the sampled token alone, at temperature 1
        "detokenize": False,
    }
