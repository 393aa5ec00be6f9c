"""The checks of smoke.py: each reads what a run has left, and says PASS or FAIL with the numbers it found."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from megatron_opsd.reliability.run_dir import RunDir, read_jsonl

SAVED, LAST = 2, 3  # the checkpoint to resume from, and the last step

# How far our logits may be from a float32 reference, relative to its norm: on a GPU in terms of what bfloat16 costs
# transformers itself, for float32 absolutely.
MAX_LOGIT_ERROR_FACTOR, MAX_LOGIT_ERROR = 2.0, 1e-5
# A resumed run on a GPU: the backward pass adds up in no fixed order, so weights may differ by a part of the update.
MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE = 1e-3, 0.1
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


def check_logits(errors: Mapping[str, Any]) -> Result:
    """``errors``: what :func:`compare_logits` wrote."""
    ours, theirs, dtype = errors["ours"], errors["theirs"], errors["dtype"]
    limit = MAX_LOGIT_ERROR if dtype == "float32" else MAX_LOGIT_ERROR_FACTOR * theirs
    own = "" if dtype == "float32" else f", transformers' own {theirs:.2e}"
    numbers = f"{errors['layers']}, {dtype}, relative error {ours:.2e}{own}, limit {limit:.2e}"
    look_at = "megatron_opsd/weights/tables.py (Transformer Engine's names) and megatron_opsd/model/gpt.py"
    return result("logits", ours <= limit, numbers, look_at)  # NaN fails


def check_exit(out: Path, name: str, status: int) -> Result:
    """A run that has done all its work may still die at its very end, where vLLM's memory is freed."""
    printed = out / f"{name}.txt"
    errors = [line for line in printed.read_text(errors="replace").splitlines() if "CUDA Error" in line]
    numbers = f"status {status}" + (f", {errors[0]}" if errors else ", no CUDA error")
    return result(f"end of the {name}", status == 0 and not errors, numbers, f"{printed}; ColocatedVLLM.close")


def check_refit(run_dir: Path, dtype: str) -> Result:
    """vLLM's log-probs against Megatron's, of every step."""
    from megatron_opsd.rollout.refit import MAX_LOGPROB_GAP  # brings Megatron, which takes its time

    gaps = [line["refit_logprob_gap"] for line in read_jsonl(run_dir / "metrics.jsonl")]
    limit = MAX_LOGPROB_GAP[dtype]
    # JSON has no NaN: it is written as null.
    passed = len(gaps) == LAST and all(gap is not None and gap <= limit for gap in gaps)
    shown = ", ".join("none" if gap is None else f"{gap:.2e}" for gap in gaps)
    numbers = f"mean gap of vLLM's log-probs {shown} nats in {len(gaps)} steps, limit {limit:g}"
    return result("refit gap", passed, numbers, "megatron_opsd/rollout/refit.py, and vLLM's attention backend")


def check_resume(run_dir: Path, resumed: Path, model: Path, exact: bool) -> Result:
    """The last step of the unbroken run against that of one that went on from the checkpoint before it.

    exact: all numbers and weights are equal bit for bit (CPU). Otherwise the rollouts are the same, the loss nearly,
    and the weights, except for a part of what the run changed, which lost optimizer states would exceed.
    """
    (wanted,), (line,) = (
        [line for line in RunDir(path).repeatable_metrics() if line["step"] == LAST] for path in (run_dir, resumed)
    )
    ours, theirs = (read_jsonl(path / "rollouts" / f"step_{LAST:06d}.jsonl") for path in (resumed, run_dir))
    same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(ours, theirs, strict=True))
    losses = [math.nan if value["loss"] is None else value["loss"] for value in (line, wanted)]
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    weights = weight_difference(run_dir / "hf", resumed / "hf", model)
    limits = (0.0, 0.0) if exact else (MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE)
    passed = same == len(theirs) and loss <= limits[0] and weights <= limits[1]
    different = [name for name in wanted if line[name] != wanted[name]]
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
    """GiB that each move on a rank's GPU must free or take at least; what is too small to be seen is left out."""

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


CACHE = re.compile(r"Available KV cache memory: ([0-9.]+) GiB")  # vLLM's own words


def check_memory(run_dir: Path, expected: Expected) -> list[Result]:
    """A line for each kind of move in events.jsonl, for the step in which it moved least."""
    name = "memory, {}".format
    moves: dict[str, list[tuple[float, float]]] = {}
    for event in read_jsonl(run_dir / "events.jsonl"):
        if event["event"] == "move":
            moves.setdefault(event["what"], []).append(event["free_gib"])
    log = run_dir / "logs" / "train_rank_0000.log"
    cache = CACHE.search(log.read_text())
    if not moves or cache is None:
        missing = "no moves in events.jsonl" if not moves else f"no size of vLLM's KV cache in {log}"
        return [result(name("moves"), False, missing, "megatron_opsd/device_memory.py")]
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
        return result(name, False, f"{len(seen)} times in {LAST} steps", "megatron_opsd/device_memory.py")
    last = seen[1 - LAST :]  # in the first step there are no moments of Adam to move yet
    before, after = min(last, key=lambda pair: (pair[1] - pair[0]) / wanted)
    moved, verb = (after - before, "frees") if wanted > 0 else (before - after, "takes")
    least = 0.9 * abs(wanted) - 0.2  # allocators keep part of a block
    numbers = f"{verb} {moved:.1f} GiB ({before:.1f} to {after:.1f} GiB free), expected {abs(wanted):.1f}"
    return result(
        name, moved >= least, numbers, "megatron_opsd/device_memory.py, and vLLM's sleep level 2 in the log of rank 0"
    )
