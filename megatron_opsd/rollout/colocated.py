"""vLLM inside the training processes, in turns with training on the same devices."""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.config import Config
from megatron_opsd.rollout.engine import Sampling
from megatron_opsd.types import Rollout

if TYPE_CHECKING:
    from vllm import LLM


def prepare_environment() -> None:
    """What vLLM reads from the environment while it is imported; values the user has set stay.

    The one place where the project sets variables for vLLM.
    """
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "0",  # vLLM's messages go where the run's go
    }
    if not torch.cuda.is_available():
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


class ColocatedVLLM:
    """An :class:`Engine` of world size / tensor_model_parallel_size vLLM engines, each on neighbouring ranks.

    Starts with random weights: refit before the first token.
    """

    def __init__(self, config: Config, max_model_len: int) -> None:
        self._llm = _start(config, max_model_len)
        size = config.rollout.tensor_model_parallel_size
        self._engine, self._rank_in_engine = divmod(dist.get_rank(), size)
        self._engines = dist.get_world_size() // size
        self._can_sleep = torch.cuda.is_available()
        self._version = -1

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        from vllm import SamplingParams

        assert self._version >= 0, "refit before the first token"
        own = slice(self._engine, None, self._engines)
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts[own]],
            [
                SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seed=seed,
                    logprobs=0,  # of the sampled token alone, at temperature 1
                    detokenize=False,
                )
                for seed in seeds[own]
            ],
            use_tqdm=False,
        )
        rollouts = [self._rollout(output.outputs[0]) for output in outputs]
        # One rank speaks for each engine; all ranks get all rollouts.
        gathered: list[list[Rollout]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, rollouts if self._rank_in_engine == 0 else [])
        by_engine = gathered[:: dist.get_world_size() // self._engines]
        return [by_engine[i % self._engines][i // self._engines] for i in range(len(prompts))]

    def _rollout(self, completion: "object") -> Rollout:
        token_ids = list(completion.token_ids)  # type: ignore[attr-defined]
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]  # type: ignore[attr-defined]
        return Rollout(token_ids, logprobs, str(completion.finish_reason), self._version)  # type: ignore[attr-defined]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # until the whole set has arrived
        if not torch.cuda.is_available():
            self._llm.apply_model(_unpack_experts)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if not torch.cuda.is_available():
            self._llm.apply_model(_pack_tied_head)
        self._llm.reset_prefix_cache()
        self._version = version

    def sleep(self) -> None:
        if self._can_sleep:
            self._version = -1  # level 2 drops the weights
            self._llm.sleep(level=2)

    def wake_up_weights(self) -> None:
        if self._can_sleep:
            self._llm.wake_up(tags=["weights"])

    def wake_up_kv_cache(self) -> None:
        if self._can_sleep:
            self._llm.wake_up(tags=["kv_cache"])

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _unpack_experts(model: "torch.nn.Module") -> None:
    """On CPU vLLM packs the experts' weights when it first makes their kernel, and copies a reload's in unpacked.

    Without its kernel a layer takes the reload as its first weights.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in model.modules():
        if isinstance(module, UnquantizedFusedMoEMethod):
            module.moe_kernel = None


def _pack_tied_head(model: "torch.nn.Module") -> None:
    """On CPU vLLM packs a copy of the head's weight; a reload does not refresh it where the embedding is the head."""
    head = model.get_submodule("lm_head")
    head.quant_method.process_weights_after_loading(head)  # type: ignore[union-attr, operator]


def _start(config: Config, max_model_len: int) -> "LLM":
    prepare_environment()
    from vllm import LLM

    rollout = config.rollout
    on_gpu = torch.cuda.is_available()
    return LLM(
        config.model.path,
        dtype=config.model.dtype,
        load_format="dummy",
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        distributed_executor_backend="external_launcher",
        max_model_len=max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        enforce_eager=rollout.enforce_eager or not on_gpu,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_memory_bytes=None if on_gpu else int(rollout.kv_cache_gib * 2**30),
        enable_sleep_mode=on_gpu,
        enable_chunked_prefill=None if on_gpu else False,  # it rewinds seeded generators, which the CPU's cannot
        max_num_batched_tokens=None if on_gpu else max(max_model_len, 8192),
        seed=config.train.seed,
        disable_log_stats=True,
    )
