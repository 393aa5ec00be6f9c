"""What the server process of ``harness.py`` imports once, so that the ranks it forks need not."""

import gc
import os
from importlib import import_module

_before = dict(os.environ)

import_module("megatron_opsd.run")  # Megatron-Core before vLLM: on CPU it needs the shim
import_module("megatron_opsd.rollout.colocated").import_vllm()
for _module in (
    "pytest",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.v1.worker.cpu_worker",
):
    import_module(_module)

# What the imports have set in the environment, above all for vLLM.
SETTINGS = {name: value for name, value in os.environ.items() if _before.get(name) != value}

gc.freeze()  # the ranks' collections need not go through all of this: a quarter of a second each time
