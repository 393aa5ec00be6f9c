"""Lets Megatron-Core run on CPU and gloo. Only `parallel.py` knows this file; it installs it if there is no GPU.

Megatron names CUDA in hundreds of places. With these patches the current device is the CPU, tensors for "cuda" are made
on the CPU, and streams do nothing.
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
    """Stands for a CUDA stream or event. A CPU runs everything in order, so it does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, *_: object) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: object) -> "_Stream":
        return self


def install() -> None:
    """Patch torch.cuda. Call once, before Megatron is imported."""
    torch._dynamo.config.disable = True  # Megatron compiles small functions, which takes minutes of C++ builds on a CPU
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
    _repair_moe_dispatcher()


def _repair_rng() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _repair_moe_dispatcher() -> None:
    """Give torch the sizes of an all-to-all as lists. Megatron only converts tensors from a GPU to lists."""
    from megatron.core.transformer.moe import token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.tolist() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move
    # Set it here: later, torch.cuda.Stream may be vLLM's own stand-in, which cannot record events.
    dispatcher: Any = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = _Stream()
