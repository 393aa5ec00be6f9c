"""What compat/ patches, or uses though it is private, is still the code that it was written for, and has its faults.

One process without the patches looks at the packages as they are. A fingerprint that differs is no fault by itself:
read the new code, decide whether the patch still fits or is still needed, and write the new fingerprint here.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

MEGATRON, TORCH, VLLM = "megatron_internals", "torch_internals", "vllm_internals"
# module:name of upstream -> which file of compat/ depends on it, and the CRC-32 of its source
UPSTREAM = {
    "megatron.core.models.gpt.gpt_model:GPTModel._postprocess": (MEGATRON, "f1f09cfb"),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict": (MEGATRON, "c86f6e1b"),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict": (MEGATRON, "8dd1510f"),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map": (MEGATRON, "e8341e23"),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states": (
        MEGATRON,
        "0923c3c4",
    ),
    "megatron.core.optimizer.optimizer:ChainedOptimizer.step": (MEGATRON, "906cd2ea"),
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_get_write_results_queue": (MEGATRON, "539d480f"),
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state": ("cpu", "27442fd5"),
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": ("cpu", "7770bad7"),
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": ("cpu", "d604b862"),
    "torch.distributed.distributed_c10d:_get_default_store": (TORCH, "119bb389"),
    "torch.testing._internal.distributed.fake_pg:FakeStore": (TORCH, "4b5568d8"),
    "vllm.model_executor.model_loader.reload:finalize_layerwise_reload": (VLLM, "b77442c5"),
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod"
    ".process_weights_after_loading": (VLLM, "eed483ad"),
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed.__init__": (VLLM, "568a62dd"),
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed._init_cpu_shm": (VLLM, "81cd8db3"),
    "vllm.device_allocator.cumem:CuMemAllocator.sleep": (VLLM, "02b17664"),
}

LOOK = """
import importlib, inspect, json, sys, zlib
from functools import reduce
from megatron_opsd.rollout.vllm_setup import prepare_environment

prepare_environment()
import torch

def fails(call):
    try:
        call()
    except Exception:
        return True
    return False

found = {}
for name in json.loads(sys.argv[1]):
    module, _, path = name.partition(":")
    code = reduce(getattr, path.split("."), importlib.import_module(module))
    found[name] = f"{zlib.crc32(inspect.getsource(code).encode()):08x}"
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher

sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(2, dtype=torch.int64), as_numpy=True)
print(json.dumps({"found": found, "faults": {
    "Megatron asks CUDA for its device": fails(torch.cuda.current_device),
    "Megatron's random states are CUDA's": fails(random._get_cuda_rng_state),
    "sizes of an all-to-all stay a tensor on a CPU": torch.is_tensor(sizes),
    "te_general_gemm is undefined without Transformer Engine": not hasattr(moe_utils, "te_general_gemm"),
    "the queue of writers' reports is a global": filesystem_async._results_queue is None,
}}))
"""


@pytest.fixture(scope="module")
def upstream() -> dict[str, Any]:
    """Fingerprints and faults of the installed packages, without our patches."""
    process = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(list(UPSTREAM))], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_upstream_is_what_was_patched(upstream: dict[str, Any]) -> None:
    changed = {name: now for name, now in upstream["found"].items() if now != UPSTREAM[name][1]}
    lines = [f"{name} is now {now}: read it, then compat/{UPSTREAM[name][0]}.py" for name, now in changed.items()]
    assert not lines, "\n".join(lines)


def test_upstream_still_needs_it(upstream: dict[str, Any]) -> None:
    gone = [fault for fault, there in upstream["faults"].items() if not there]
    assert not gone, f"no longer true, so a patch of compat/ can go: {gone}"
