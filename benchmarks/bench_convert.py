"""Speed and memory of the conversion, compared with ``cp``: a synthetic Qwen3 of 4 GB, both directions, as Markdown.

``cp`` and both directions take turns on the same disk, each from a cold cache and each until its files are on the disk.
Time and memory are those of the conversion, without the seconds and megabytes of the imports.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from megatron_opsd.convert import convert
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import ShardWriter, shard_name, write_index
from megatron_opsd.weights.mapping import NameTable

# Qwen3-4B's sizes with fewer layers.
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 16,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
MB = 10**6


def write_model(path: Path, shard_bytes: int, **changes: object) -> int:
    """Write a Hugging Face directory of random weights in bfloat16; returns their bytes."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    tensors = NameTable(read_architecture(path)).hf_tensors()
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in tensors.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
        total += nbytes
    for i, shard in enumerate(shards):
        writer = ShardWriter(path / shard_name(i, len(shards)), shard, torch.bfloat16)
        left = sum(torch.Size(shape).numel() for shape in shard.values())
        while left > 0:
            writer.write(noise[:left].roll(left))
            left -= len(noise)
        writer.close()
    write_index(path, shards, total)
    return total


def private_memory() -> int:
    """RssAnon of this process in bytes: neither mapped files nor the page cache count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def convert_once(direction: str, source: Path, target: Path, dtype: str | None) -> dict[str, float]:
    """Convert in this process; returns the seconds and the peak of private memory minus that at the start."""
    before, peak, done = private_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], private_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    if direction == "hf-to-megatron":
        convert.hf_to_megatron(source, target, getattr(torch, dtype) if dtype else None, verify=False)
    else:
        convert.megatron_to_hf(source, target, verify=False)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak": peak[0] - before}


def in_a_process(direction: str, source: Path, target: Path, *flags: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", direction, str(source), str(target), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def copy(source: Path, target: Path) -> dict[str, float]:
    """``cp -r``, followed by fsync of every file."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for path in target.rglob("*"):
        sync(path)
    return {"seconds": time.perf_counter() - start}


def sync(path: Path, forget: bool = False) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    if forget and path.is_file():
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def one_round(folder: Path) -> list[dict[str, float]]:
    """Run cp, one direction, cp, the other direction and cp again, each from a cold cache."""
    hf, megatron, back = folder / "model", folder / "megatron", folder / "back"
    results: list[dict[str, float]] = []
    for name in ("cp", "hf-to-megatron", "cp", "megatron-to-hf", "cp"):
        source = megatron if name == "megatron-to-hf" else hf
        for path in source.rglob("*"):
            sync(path, forget=True)
        if name == "cp":
            results.append(copy(hf, folder / "copy"))
            shutil.rmtree(folder / "copy")
        else:
            results.append(in_a_process(name, source, megatron if source == hf else back))
    shutil.rmtree(megatron)
    shutil.rmtree(back)
    return results


def table(rounds: list[list[dict[str, float]]], size: int) -> str:
    """Medians over the rounds; speed also relative to the copies just before and just after."""
    rows = [
        "| | seconds | GB/s | of `cp` in the same round (each round) | peak RssAnon over the imports |",
        "| --- | --- | --- | --- | --- |",
    ]
    copies = [result["seconds"] for results in rounds for result in results[::2]]
    rows.append(
        f"| `cp` and fsync | {statistics.median(copies):.1f} | {size / statistics.median(copies) / 1e9:.2f} | | |"
    )
    for place, name in ((1, "Hugging Face to Megatron"), (3, "Megatron to Hugging Face")):
        seconds = statistics.median(results[place]["seconds"] for results in rounds)
        shares = []
        for results in rounds:
            neighbours = statistics.mean(results[i]["seconds"] for i in (place - 1, place + 1))
            shares.append(neighbours / results[place]["seconds"])
        share = f"{statistics.median(shares):.0%} ({', '.join(f'{x:.0%}' for x in shares)})"
        peak = max(results[place]["peak"] for results in rounds) / MB
        rows.append(f"| {name} | {seconds:.1f} | {size / seconds / 1e9:.2f} | {share} | {peak:.0f} MB |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to work: a disk with 20 GB left (default: the system's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument(
        "--one", nargs=3, metavar=("DIRECTION", "FROM", "TO"), help="convert once and print the numbers"
    )
    parser.add_argument("--dtype", help="with --one: of the result, such as float32")
    options = parser.parse_args()
    if options.one:
        direction, source, target = options.one
        print(json.dumps(convert_once(direction, Path(source), Path(target), options.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = write_model(folder / "model", options.shard_mb * MB)
        rounds = []
        for i in range(options.rounds):
            rounds.append(one_round(folder))
            print(f"round {i + 1}:", ", ".join(f"{result['seconds']:.1f} s" for result in rounds[-1]), flush=True)
    text = f"{size / 1e9:.1f} GB in bfloat16, shards of {options.shard_mb} MB, {os.cpu_count()} cores, "
    text += f"torch {torch.__version__}, {platform.system()} {platform.release()}\n\n{table(rounds, size)}\n"
    print(text)
    out = Path(__file__).parent / "results" / "convert.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(f"# Conversion beside `cp`\n\n{text}")


if __name__ == "__main__":
    main()
