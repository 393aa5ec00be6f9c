"""Compares export in buckets with export tensor by tensor. It takes a minute on a CPU:

    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node 4 benchmarks/bench_export.py

Exports a model of many small tensors (TP2 PP2, 48 layers, hidden size 64) under its Hugging Face names, as every refit
does. Buckets and single tensors (a bucket for each) take turns in one run. Prints a Markdown table.
"""

import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from transformers import Qwen3Config

from megatron_opsd.config import ModelConfig, ParallelConfig
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import build_model
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import Exporter
from megatron_opsd.weights.mapping import NameTable

REPEATS = 9
WAYS = {"tensor by tensor": 1, "buckets of 512 MiB": 512 * 2**20}


def main() -> None:
    torch.set_num_threads(1)
    sizes = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    layout = parallel.initialize(sizes, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        Qwen3Config(
            vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=48, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
        ).save_pretrained(folder)  # fmt: skip
        arch = read_architecture(folder)
        model = build_model(arch, ModelConfig(path=folder, dtype="float32"), sizes, layout.pg_collection)
    groups = layout.tp_group, layout.pp_group, layout.ep_group
    exporters = {way: Exporter(model, NameTable(arch), *groups, size) for way, size in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    tensors = 0
    for turn in range(REPEATS + 1):
        for way, exporter in exporters.items():
            dist.barrier()
            start = time.perf_counter()
            tensors = sum(1 for _ in exporter)
            dist.barrier()
            if turn:  # the first warms up
                seconds[way].append(time.perf_counter() - start)
    if layout.rank == 0:
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        print(f"{tensors} tensors, 4 ranks (TP2 PP2), {os.cpu_count()} cores, median of {REPEATS}\n")
        print("| way | seconds | tensor by tensor / this |\n| --- | ---: | ---: |")
        for way, median in medians.items():
            print(f"| {way} | {median:.4f} | {medians['tensor by tensor'] / median:.1f} |")
    parallel.finalize()


if __name__ == "__main__":
    main()
