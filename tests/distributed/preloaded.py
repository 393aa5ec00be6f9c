"""What the server process of ``harness.py`` imports once, so that the ranks it forks need not."""

import gc
from importlib import import_module

import megatron_opsd.trainer  # noqa: F401 - Megatron-Core first: on CPU it needs the shim
from megatron_opsd.rollout.colocated import import_vllm

import_vllm()
for module in (
    "pytest",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.v1.worker.cpu_worker",
):
    import_module(module)
gc.freeze()  # the ranks' collections need not go through all of this: a quarter of a second each time
