"""vLLM inside the training processes. It takes turns with training on the same devices."""

import atexit
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.compat.vllm_internals import (
    after_reload,
    before_reload,
    repair_shared_memory,
    sleeping_bytes,
    without_numa_warnings,
)
from megatron_opsd.config import Config
from megatron_opsd.errors import StepAbortedError
from megatron_opsd.rollout.engine import RefitError, Sampling
from megatron_opsd.rollout.vllm_setup import engine_arguments, prepare_environment, sampling_arguments
from megatron_opsd.types import Rollout

if TYPE_CHECKING:
    from vllm import LLM


class ColocatedVLLM:
    """An :class:`Engine` made of world size / tensor_model_parallel_size vLLM engines, each on consecutive ranks.

    It starts with random weights: refit before the first token.
    """

    def __init__(self, config: Config, max_model_len: int) -> None:
        self._llm = _start(config, max_model_len)
        size = config.rollout.tensor_model_parallel_size
        self._engine, self._rank_in_engine = divmod(dist.get_rank(), size)
        self._engines = dist.get_world_size() // size
        self._group = _join_group(size) if size > 1 else None
        self._can_sleep = torch.cuda.is_available()
        self._version = -1
        self.finished = 0
        self._asleep: set[str] = set()
        atexit.register(self._wake_up_all)  # also if a guard or a user's mistake ends the run

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        should_abort: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        assert self._version >= 0, "refit before the first token"
        from vllm import SamplingParams

        own = slice(self._engine, None, self._engines)
        requests = self._llm.enqueue(
            [{"prompt_token_ids": prompt} for prompt in prompts[own]],
            [SamplingParams(**sampling_arguments(sampling, seed)) for seed in seeds[own]],
            use_tqdm=False,
        )
        rollouts = self._run(requests, should_abort)
        # One rank of each engine sends its rollouts; all ranks get all rollouts.
        gathered: list[list[Rollout] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, rollouts if self._rank_in_engine == 0 or rollouts is None else [])
        if any(part is None for part in gathered):
            raise StepAbortedError("given up while responses were written")
        by_engine = [part or [] for part in gathered][:: dist.get_world_size() // self._engines]
        return [by_engine[i % self._engines][i // self._engines] for i in range(len(prompts))]

    def _run(self, requests: list[str], should_abort: Callable[[], bool]) -> list[Rollout] | None:
        """The rollouts of all requests in order, or None if all ranks of this engine abandoned them."""
        engine, outputs = self._llm.llm_engine, []
        self.finished = 0
        for step in itertools.count():
            if not engine.has_unfinished_requests():
                return [self._rollout(output.outputs[0]) for output in sorted(outputs, key=lambda o: int(o.request_id))]
            # The ranks of an engine must do the same at the same step, so they must agree. Do it only now and then.
            leave = should_abort() if self._group is None else step % 16 == 0 and _any(should_abort(), self._group)
            if leave:
                engine.abort_request(requests, internal=True)
                return None
            outputs += [output for output in engine.step() if output.finished]
            self.finished = len(outputs) * self._engines  # the others are about as far
        raise AssertionError

    def _rollout(self, completion: "object") -> Rollout:
        token_ids = list(completion.token_ids)  # type: ignore[attr-defined]
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]  # type: ignore[attr-defined]
        return Rollout(token_ids, logprobs, str(completion.finish_reason), self._version)  # type: ignore[attr-defined]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # until the whole set has arrived
        self._llm.apply_model(partial(before_reload, model_config=self._llm.llm_engine.model_config))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        self._llm.apply_model(after_reload)
        if not self._llm.reset_prefix_cache():
            raise RefitError("refit: vLLM did not reset its prefix cache, so answers could come from earlier weights")
        self._version = version

    def sleep(self) -> None:
        if self._can_sleep:
            self._version = -1  # level 2 drops the weights
            self._llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}

    def wake_up_weights(self) -> None:
        self._wake_up("weights")

    def wake_up_kv_cache(self) -> None:
        self._wake_up("kv_cache")

    def _wake_up(self, tag: str) -> None:
        if tag in self._asleep:  # vLLM would map memory that is already awake a second time
            self._llm.wake_up(tags=[tag])
            self._asleep.remove(tag)

    def sleeping_bytes(self) -> int:
        return sleeping_bytes() if self._asleep else 0

    def close(self) -> None:
        self._wake_up_all()
        atexit.unregister(self._wake_up_all)
        self._llm.llm_engine.engine_core.shutdown()

    def _wake_up_all(self) -> None:
        """Map all sleeping memory: at the end of the process torch frees vLLM's pools, which crashes if they sleep.

        If training itself ran out of memory, there is no room and this fails too, after the first error.
        """
        for tag in ("weights", "kv_cache"):
            self._wake_up(tag)


def _join_group(size: int) -> dist.ProcessGroup:
    """A CPU process group of the ranks of this rank's engine. All ranks of the run call this."""
    first = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(list(range(rank, rank + size)), backend="gloo") for rank in first]
    return groups[dist.get_rank() // size]  # type: ignore[return-value]


def _any(flag: bool, group: dist.ProcessGroup) -> bool:
    flags = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return bool(flags)


@cache
def import_vllm() -> "type[LLM]":
    """vLLM's class for an engine in this process, imported after its environment variables are set."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # run the engine in this process
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # send vLLM's messages to the run's logs
    prepare_environment()
    from vllm import LLM

    if not torch.cuda.is_available():
        repair_shared_memory()
    return LLM


def _start(config: Config, max_model_len: int) -> "LLM":
    on_gpu = torch.cuda.is_available()
    with nullcontext() if on_gpu else without_numa_warnings():
        return import_vllm()(
            **engine_arguments(config, max_model_len),
            distributed_executor_backend="external_launcher",
            enable_sleep_mode=on_gpu,
        )
