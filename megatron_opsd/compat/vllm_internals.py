"""Patches and private names of vLLM 0.32. tests/unit/test_compat.py fails when they need another look.

vLLM is imported only inside functions, because its environment variables have to be set before that.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)


def before_reload(model: nn.Module, model_config: Any) -> None:
    """Call before each reload of all weights.

    An interrupted reload leaves layers half loaded, and vLLM would count their tensors for the next reload. Drop them.
    On CPU, vLLM packs the experts only when it first makes their kernel; a reload would copy them in unpacked. Remove
    the kernel, so that vLLM treats the reload like the first load.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    if torch.cuda.is_available():
        return
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in model.modules():
        if isinstance(module, UnquantizedFusedMoEMethod):
            module.moe_kernel = None


def after_reload(model: nn.Module) -> None:
    """Call after each reload. On CPU vLLM keeps a packed copy of the head. If tied, a reload leaves the copy stale."""
    if not torch.cuda.is_available():
        head = model.get_submodule("lm_head")
        head.quant_method.process_weights_after_loading(head)  # type: ignore[union-attr, operator]


@contextmanager
def without_numa_warnings() -> Iterator[None]:
    """Around the start of an engine on CPU: C++ then says on stderr where memory is, of which nobody makes any use.

    What else it writes there goes to the log.
    """
    python, stderr = sys.stderr, os.dup(2)
    python.flush()
    with os.fdopen(stderr, "w", buffering=1) as sys.stderr, tempfile.TemporaryFile() as written:  # Python's still shows
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            sys.stderr = python
            written.seek(0)
            for line in written.read().decode(errors="replace").splitlines():
                if "NUMA" not in line:
                    _log.warning(line)


def repair_shared_memory() -> None:
    """On CPU, let several runs share a machine. Call before an engine of several ranks starts in its own processes.

    The ranks of an engine share memory. If torchrun started them, vLLM 0.32 names it only after the ranks, and a killed
    run leaves it behind. The next run then fails. Here the name contains the run's port and is removed once all ranks
    have opened it.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    join = _CPUSHMDistributed._init_cpu_shm

    def join_and_unlink(self: Any) -> int:
        self.group_name = os.environ["MASTER_PORT"] + self.group_name.lstrip("/")
        handle = join(self)  # ends with a barrier
        Path(f"/dev/shm/{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
        return handle

    _CPUSHMDistributed._init_cpu_shm = join_and_unlink


def sleeping_bytes() -> int:
    """Bytes of vLLM's memory pools that sleep in this process. torch's allocator still counts them as allocated."""
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    asleep = {address for address, allocation in allocator.pointer_to_data.items() if allocation.is_asleep}
    pools = [pool for entries in allocator.allocator_and_pools.values() for pool, _ in entries]
    segments = (segment for pool in pools for segment in pool.snapshot())
    return sum(segment["allocated_size"] for segment in segments if segment["address"] in asleep)
