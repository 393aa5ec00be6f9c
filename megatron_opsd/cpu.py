"""Lets Megatron-Core run on CPU and gloo. `parallel.py` installs it where there is no GPU; nothing else knows.

Megatron names CUDA in hundreds of places. Here the current device answers with the CPU, tensors asked for on
"cuda" are made on the CPU, streams do nothing, and the plain torch Adam that stands in for the fused one is
saved and restored rightly by the distributed optimizer.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo.config
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Sends ``device="cuda"`` to the CPU and lets tensors report the CUDA type names that Megatron compares."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = {**kwargs, "device": CPU}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


class _Stream:
    """A CUDA stream or event on a device that runs everything in order."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, *_: object) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: object) -> "_Stream":
        return self


def install() -> None:
    """Patch torch.cuda and Megatron's optimizer. Call once, before Megatron is imported."""
    torch._dynamo.config.disable = True  # Megatron compiles small functions: minutes of C++ builds on a CPU
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *_, **__: None
    cuda.Stream = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.FloatTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.BFloat16Tensor
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    _CudaMeansCpu().__enter__()
    _repair_rng()
    _repair_distributed_optimizer()


def _repair_rng() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _repair_distributed_optimizer() -> None:
    """Round-trip torch's Adam through the distributed optimizer's checkpoints (three repairs, see the comments)."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    describe_state, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def describe(self: Any) -> dict:
        for group in self.optimizer.param_groups:  # torch's Adam has no state to load into before its first step
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return describe_state(self)

    def load(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for param_state in self.optimizer.state.values():  # Megatron restores one shared tensor, and torch's Adam
            param_state["step"] = param_state["step"].clone()  # would count it up once for each parameter

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":  # only torch's Adam has it in the state; Megatron keeps it in the group
                target.copy_(tensors[key])

    DistributedOptimizer.state_dict = describe
    DistributedOptimizer.load_state_dict = load
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
