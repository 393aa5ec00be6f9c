"""What the two engines share: vLLM's environment variables and its arguments.

This module does not import vLLM, because the environment has to be set before that.
"""

import os
from typing import Any

import torch

from megatron_opsd.config import Config
from megatron_opsd.rollout.engine import Sampling


def prepare_environment() -> None:
    """Set the variables that vLLM reads when it is imported. Values that the user has set stay."""
    settings = {"VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def engine_arguments(config: Config, max_model_len: int) -> dict[str, Any]:
    """vLLM's arguments for both kinds of engine. Its weights are random: refit before the first token."""
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
        "enable_chunked_prefill": None if on_gpu else False,  # it rewinds seeded generators; on CPU they cannot
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
        "logprobs": 0,  # only of the sampled token, at temperature 1
        "detokenize": False,
    }
