"""Checks that the upstream code behind compat/ is unchanged, and that the faults that compat/ repairs are still there.

One process without the patches looks at the packages as they are. A new fingerprint alone does not mean that something
is wrong: read the new code, decide whether the patch still fits and is still needed, and write the new one here.
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

LOOK = '''
import importlib, inspect, json, sys, zlib
from functools import reduce
from megatron_opsd.rollout.vllm_setup import prepare_environment

prepare_environment()
import torch

def fails(call, error=Exception):
    try:
        call()
    except error:
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
faults = {
    "Megatron asks CUDA for its device": fails(torch.cuda.current_device),
    "Megatron's random states are CUDA's": fails(random._get_cuda_rng_state),
    "sizes of an all-to-all stay a tensor on a CPU": torch.is_tensor(sizes),
    "te_general_gemm is undefined without Transformer Engine": not hasattr(moe_utils, "te_general_gemm"),
    "the queue of writers' reports is a global": filesystem_async._results_queue is None,
}

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import reload

def head_is_stale(tied):
    """Reload embedding and head as vLLM does. Whether the head then still computes with the old weights."""
    model = torch.nn.Module()
    with set_current_vllm_config(VllmConfig()):
        model.embed_tokens = VocabParallelEmbedding(64, 32, disable_tp=True)
        model.lm_head = ParallelLMHead(64, 32, disable_tp=True)
    if tied:
        model.lm_head = model.lm_head.tie_weights(model.embed_tokens)
    reload.record_metadata_for_reloading(model)
    for layer in (model.embed_tokens, model.lm_head):
        layer.weight.data.normal_()
        layer.quant_method.process_weights_after_loading(layer)
    hidden, new = torch.ones(1, 32), torch.randn(64, 32)
    before = model.lm_head.quant_method.apply(model.lm_head, hidden)
    reload.initialize_layerwise_reload(model)
    for layer in (model.embed_tokens,) if tied else (model.embed_tokens, model.lm_head):
        layer.weight.weight_loader(layer.weight, new)
    reload.finalize_layerwise_reload(model, None)
    after = model.lm_head.quant_method.apply(model.lm_head, hidden)
    assert torch.equal(model.lm_head.weight, new)
    assert torch.equal(after, before) or torch.allclose(after, hidden @ new.T, atol=1e-4)
    return torch.equal(after, before)

assert not head_is_stale(tied=False)
faults["after a reload, the head computes with the old weights if it is tied"] = head_is_stale(tied=True)

# From here on Megatron is patched to run on a CPU; its optimizer is not patched.
from megatron_opsd.model.parallel import pretended_layout
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron_opsd.config import ParallelConfig

with pretended_layout(0, 1, ParallelConfig()):
    module = torch.nn.Linear(4, 4)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), module)
    whole = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True), [ddp], use_gloo_process_groups=False
    )
    (optimizer,) = getattr(whole, "chained_optimizers", [whole])

    def step():
        for parameter in module.parameters():
            parameter.main_grad.fill_(1.0)
        whole.step()
        return [float(state["step"]) for state in optimizer.optimizer.state.values()]

    faults["torch's Adam has no state dict before its first step"] = fails(optimizer.state_dict, AssertionError)
    assert step() == [1, 1]
    optimizer.load_state_dict(optimizer.state_dict())
    faults["torch's Adam counts a step once for each parameter after a load"] = step() == [3, 3]
    tensors = {name: torch.zeros(16) for name in ("param", "exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        faults["the step of torch's Adam cannot be loaded with its moments"] = fails(
            lambda: optimizer._set_main_param_and_optimizer_states(module.weight, tensors), KeyError
        )

print(json.dumps({"found": found, "faults": faults}))
'''


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
