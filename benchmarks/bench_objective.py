"""Compares time and memory of the objective with other packages: `make bench`, on a GPU if there is one.

All candidates get the same tensors in the same process, take turns, and compute the loss and its gradients. Before
anything is timed, each gradient is compared with that of the textbook formula in float64. Time is process time on a
CPU, with one thread, and wall time between synchronisations on a GPU. Memory is the peak minus what was there before:
on a CPU that of a forked child that runs the candidate once, on a GPU the allocator's.

Packages that are not installed are left out. A candidate that runs out of memory has a row that says so. The results
are written to benchmarks/results/objective-{cpu,cuda}.{md,json} after every table.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_opsd.objective import Divergence, linear_divergence, vocab_parallel_divergence

VOCAB = 151_936
CLIP = 1e-5  # reached by a few entries of every token in these distributions
CHECKED_ROWS = 8
MIB = 2**20
RESULTS = Path(__file__).parent / "results"
SPECS = {
    "jsd": Divergence(kind="jsd"),
    "jsd + entry clip": Divergence(kind="jsd", clip=CLIP),
    "forward_kl": Divergence(),
}

Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One table: its inputs, their sizes and the objective."""

    source: str  # "logits" or "hidden"
    objective: str  # of SPECS
    n: int
    vocab: int  # of this rank
    hidden: int
    dtype: str
    device: str

    @property
    def title(self) -> str:
        size = f"n {self.n}, vocabulary {self.vocab}" + (f", h {self.hidden}" if self.source == "hidden" else "")
        return f"From {self.source}: {self.objective}, {size}, {self.dtype}"


@dataclass(frozen=True)
class Candidate:
    run: Run  # (student, teacher) or (hidden, head, teacher hidden, teacher head) -> gradients
    exact: bool = True  # computes the same function, so its gradient should equal that of float64
    inplace: bool = False  # writes into the student's logits
    main_grad: bool = False  # writes into the head's main_grad


@dataclass
class Row:
    """One line of a table. ``seconds`` is None where the candidate ran out of memory."""

    candidate: str
    seconds: list[float] | None = field(default_factory=list)  # quartiles: 25 %, median, 75 %
    peak_mib: float = 0.0
    gradient_error: list[float] | None = None  # L2, relative to float64, per gradient


# --- candidates -------------------------------------------------------------------------------------------------------


def textbook(student: Tensor, teacher: Tensor, spec: Divergence) -> Tensor:
    """The textbook divergence, summed over tokens; exact in float64."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if spec.kind == "forward_kl":
        entries = q * (log_q - log_p)
    else:
        log_m = (spec.beta * q + (1 - spec.beta) * p).log()
        entries = spec.beta * q * (log_q - log_m) + (1 - spec.beta) * p * (log_p - log_m)
    return (entries if spec.clip is None else entries.clamp(max=spec.clip)).sum()


def trl_loss(student: Tensor, teacher: Tensor, spec: Divergence) -> Tensor:
    """TRL's function as published. It has no clamp, so one is applied to its entries."""
    from trl.experimental.gkd import GKDTrainer

    beta = 0.0 if spec.kind == "forward_kl" else spec.beta
    reduction = "sum" if spec.clip is None else "none"
    entries = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction=reduction)
    return entries if spec.clip is None else entries.clamp(max=spec.clip).sum()


def from_logits(spec: Divergence, vocab: int) -> dict[str, Candidate]:
    """All candidates that start from logits [n, v]."""

    def ours(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, ...]:
        loss = vocab_parallel_divergence(student, teacher, spec, vocab_size=vocab, tp_group=None, **options).loss.sum()
        return torch.autograd.grad(loss, student)

    def trl(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(trl_loss(student, teacher, spec), student)

    def trl_widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(trl_loss(student.float(), teacher.float(), spec), student)

    def cross_entropy(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        labels = torch.zeros(len(teacher), 1, dtype=torch.long, device=teacher.device)
        loss = fused_vocab_parallel_cross_entropy(student[:, None], labels, dist.group.WORLD)  # [s, b, v]
        return torch.autograd.grad(loss.sum(), student)

    candidates = {
        "TRL": Candidate(trl),
        "ours": Candidate(ours),
        "ours, in place": Candidate(partial(ours, inplace=True), inplace=True),
        "TRL, logits widened to float32": Candidate(trl_widened),
        "Megatron's cross-entropy, for scale": Candidate(cross_entropy, exact=False, inplace=True),
    }
    return installed(candidates)


def installed(candidates: dict[str, Candidate]) -> dict[str, Candidate]:
    """The candidates whose package is installed."""
    modules = {"TRL": "trl", "Megatron": "megatron", "Liger": "liger_kernel"}
    missing = tuple(peer for peer, module in modules.items() if util.find_spec(module) is None)
    return {name: candidate for name, candidate in candidates.items() if not name.startswith(missing)}


def from_hidden(spec: Divergence, vocab: int, chunk_size: int) -> dict[str, Candidate]:
    """All candidates that start from hidden states [n, h] and heads [v, h]."""

    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        weights = torch.ones(len(tensors[0]), device=tensors[0].device)
        loss, _ = linear_divergence(*tensors, weights, spec, vocab_size=vocab, tp_group=None, chunk_size=chunk_size)  # type: ignore[arg-type]
        return torch.autograd.grad(loss, tensors[:2])

    def ours_to_main_grad(hidden: Tensor, head: Any, *teacher: Tensor) -> tuple[Tensor, ...]:
        return ours(hidden, head, *teacher)[0], head.main_grad

    def trl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = teacher_hidden @ teacher_head.t()
        return torch.autograd.grad(trl_loss(hidden @ head.t(), teacher, spec), (hidden, head))

    candidates = {
        "TRL on whole logits": Candidate(trl),
        "ours, head's gradient returned": Candidate(ours),
        "ours, head's gradient into main_grad": Candidate(ours_to_main_grad, main_grad=True),
    }
    if torch.cuda.is_available() and util.find_spec("liger_kernel") and spec == SPECS["jsd"]:
        candidates |= liger(spec)
    return installed(candidates)


def liger(spec: Divergence) -> dict[str, Candidate]:
    """Liger's two functions, which need a GPU and have no entry clip."""
    fused: Any = __import__("liger_kernel.transformers.fused_linear_jsd", fromlist=["_"]).LigerFusedLinearJSD
    chunked: Any = __import__("liger_kernel.chunked_loss", fromlist=["_"]).LigerFusedLinearJSDLoss
    fused_loss = fused(jsd_beta=spec.beta)
    chunked_loss = chunked(beta=spec.beta, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=True)

    def run_fused(*tensors: Tensor) -> tuple[Tensor, ...]:
        shift_labels = torch.zeros(len(tensors[0]), dtype=torch.long, device=tensors[0].device)  # no token is ignored
        loss = fused_loss(*tensors, shift_labels) * len(tensors[0])  # Liger's is the tokens' mean
        return torch.autograd.grad(loss, tensors[:2])

    def run_chunked(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> tuple[Tensor, ...]:
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        loss = chunked_loss(hidden, head, teacher_hidden, teacher_head, labels) * len(hidden)
        return torch.autograd.grad(loss, (hidden, head))

    return {"Liger fused_linear_jsd": Candidate(run_fused), "Liger chunked JSD": Candidate(run_chunked)}


# --- measuring --------------------------------------------------------------------------------------------------------


def make_tensors(case: Case) -> list[Tensor]:
    """Logits with a standard deviation of two, the teacher's .3 away; or hidden states and heads that yield them."""
    generator = torch.Generator(case.device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=case.device).to(dtype)

    if case.source == "logits":
        student = 2 * normal(case.n, case.vocab)
        return [student, student + 0.3 * normal(case.n, case.vocab)]
    hidden, head = normal(case.n, case.hidden), normal(case.vocab, case.hidden).mul_(2 * case.hidden**-0.5)
    return [hidden, head, hidden + 0.15 * normal(case.n, case.hidden), head.clone()]


def fresh(tensors: list[Tensor], candidate: Candidate) -> list[Any]:
    """Inputs for one run: the student's are leaves, logits may be overwritten, main_grad is allocated and zero."""
    inputs: list[Any] = [tensor.detach() for tensor in tensors]
    if candidate.inplace:
        inputs[0] = inputs[0].clone()
    trained = 1 if len(inputs) == 2 else 2
    inputs[:trained] = [tensor.requires_grad_() for tensor in inputs[:trained]]
    if candidate.main_grad:
        inputs[1].main_grad = torch.empty(inputs[1].shape, device=inputs[1].device).fill_(0)
        inputs[1].grad_added_to_main_grad = False
    return inputs


def exact_gradients(case: Case, few: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the textbook formula by autograd in float64."""
    inputs = [tensor.double() for tensor in few]
    trained = [tensor.requires_grad_() for tensor in (inputs[:1] if case.source == "logits" else inputs[:2])]
    student, teacher = inputs if case.source == "logits" else (inputs[0] @ inputs[1].t(), inputs[2] @ inputs[3].t())
    return torch.autograd.grad(textbook(student, teacher, SPECS[case.objective]), trained)


def gradient_error(run: Run, inputs: list[Any], exact: tuple[Tensor, ...]) -> list[float]:
    """Relative L2 distance of each gradient from that in float64."""
    gradients = run(*inputs)
    return [float((ours - truth).norm() / truth.norm()) for ours, truth in zip(gradients, exact, strict=True)]


def elapsed(run: Run, inputs: list[Any], device: str) -> float:
    """Seconds that one run takes."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    kept = run(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    del kept
    return seconds


def peak_mib(run: Run, inputs: list[Any], device: str) -> float:
    """Peak memory of one run, minus what was there before."""
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*inputs)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    receiver, sender = multiprocessing.Pipe(duplex=False)
    if (child := os.fork()) == 0:
        ctypes.CDLL(None).malloc_trim(0)  # memory that the parent freed must count when it is used again
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark to the present size
        before = resident("VmRSS")
        kept = run(*inputs)
        sender.send(resident("VmHWM") - before)
        del kept
        os._exit(0)
    sender.close()
    result = receiver.recv()  # EOFError: the child died
    os.waitpid(child, 0)
    return result


def resident(name: str) -> float:
    """A size from /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


@contextmanager
def out_of_memory_ends(row: Row) -> Iterator[None]:
    """Catch out-of-memory errors: a candidate that does not fit is also a result."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.seconds = None


def measure(case: Case, repeats: int, chunk_size: int) -> list[Row]:
    """Every candidate's line: first its gradient is checked, then memory is measured, then they are timed in turns."""
    tensors = make_tensors(case)
    spec = SPECS[case.objective]
    candidates = from_logits(spec, case.vocab) if case.source == "logits" else from_hidden(spec, case.vocab, chunk_size)
    few = [tensor[:CHECKED_ROWS] if i % 2 == 0 or len(tensors) == 2 else tensor for i, tensor in enumerate(tensors)]
    rows = {name: Row(name) for name in candidates}
    exact = exact_gradients(case, few)
    for name, each in candidates.items():
        with out_of_memory_ends(rows[name]):
            if each.exact:
                rows[name].gradient_error = gradient_error(each.run, fresh(few, each), exact)
    del exact  # gigabytes that the candidates need
    for name, each in candidates.items():
        with out_of_memory_ends(rows[name]):
            rows[name].peak_mib = peak_mib(each.run, fresh(tensors, each), case.device)
    limit = 1e-5 if case.dtype == "float32" else 1e-2
    for name, row in rows.items():
        if name.startswith("ours") and row.gradient_error and row.gradient_error[0] > limit:
            raise SystemExit(f"{case.title}: {name} is {row.gradient_error[0]:.1e} from float64")
    for turn in range(repeats + 1):
        for name, each in candidates.items():
            timed = rows[name].seconds
            if timed is not None:
                with out_of_memory_ends(rows[name]):
                    taken = elapsed(each.run, fresh(tensors, each), case.device)
                    timed += [taken] if turn else []  # the first warms up
    for row in rows.values():
        row.seconds = row.seconds and statistics.quantiles(row.seconds, n=4, method="inclusive")
    return list(rows.values())


# --- reporting --------------------------------------------------------------------------------------------------------


def as_table(case: Case, rows: list[Row]) -> str:
    """Markdown. Times and memory are also relative to the first row on the same inputs: TRL's, if it is installed."""
    base = rows[0]
    first = base.candidate.split(",")[0].split(" on ")[0]
    lines = [
        f"### {case.title}\n",
        f"| | median s | quartiles | {first} / this | peak MiB | {first} / this | gradient error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row.seconds is None:
            lines.append(f"| {row.candidate} | out of memory | | | | | |")
            continue
        low, median, high = row.seconds
        error = ", ".join(f"{value:.0e}" for value in row.gradient_error) if row.gradient_error else ""
        speed = f"{base.seconds[1] / median:.2f}" if base.seconds else ""
        memory = f"{base.peak_mib / max(row.peak_mib, 0.1):.1f}" if base.seconds else ""
        lines.append(
            f"| {row.candidate} | {median:.4f} | {low:.4f} to {high:.4f} | {speed} | {row.peak_mib:.0f} "
            f"| {memory} | {error} |"
        )
    return "\n".join(lines)


def environment(device: str, repeats: int) -> dict[str, Any]:
    """What the figures depend on."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
        machine = f"{model or platform.machine()}, one thread"
    modules = {"torch": "torch", "trl": "trl", "megatron-core": "megatron.core", "liger-kernel": "liger_kernel"}
    wanted = [name for name, module in modules.items() if util.find_spec(module)]
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in wanted}
    return {"date": date.today().isoformat(), "machine": machine, "versions": versions, "repeats": repeats}


def default_cases(device: str, scale: list[int], hidden: list[int]) -> list[Case]:
    """CPU: one size in float32, and logits in bf16. GPU: the requested sizes in bf16, also as one of 2 and 8 ranks."""
    if device == "cpu":
        logits = [Case("logits", name, 128, VOCAB, 0, "float32", device) for name in SPECS]
        bf16 = Case("logits", "jsd + entry clip", 128, VOCAB, 0, "bfloat16", device)
        return [*logits, bf16, Case("hidden", "jsd + entry clip", 512, VOCAB, 1024, "float32", device)]
    shards = [(n, VOCAB // tp) for n in scale for tp in (1, 2, 8)]
    logits = [Case("logits", name, n, width, 0, "bfloat16", device) for n, width in shards for name in SPECS]
    return logits + [
        Case("hidden", name, n, VOCAB, h, "bfloat16", device)
        for n in scale
        for h in hidden
        for name in ("jsd", "jsd + entry clip")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="run the tables whose title contains this; writes no files")
    parser.add_argument("--n", type=int, nargs="*", default=[1024, 4096, 8192, 16384], help="tokens (GPU)")
    parser.add_argument("--hidden", type=int, nargs="*", default=[1024, 2560, 5120], help="hidden sizes (GPU)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no table after this time")
    parser.add_argument("--chunk-size", type=int, default=0, help="tokens at once from hidden states; 0: the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.device == "cpu":
        torch.compiler.set_stance("force_eager")  # what Megatron compiles would need a C++ compiler
    # A group of one for Megatron. It is fake, because a real backend's threads do not survive the fork in `peak_mib`.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    chunk_size = args.chunk_size or (256 if args.device == "cpu" else 2048)
    conditions = environment(args.device, args.repeats)
    about = (
        f"{conditions['date']}, {conditions['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
        + f"; {args.repeats} repeats, {chunk_size} tokens at once from hidden states."
    )
    target = RESULTS / f"objective-{args.device}.md"
    parts, data, start = ["# The objective: time and memory", about], [], time.monotonic()
    cases = [case for case in default_cases(args.device, args.n, args.hidden) if args.only in case.title]
    for i, case in enumerate(cases):
        if time.monotonic() - start > 60 * args.minutes:
            print(f"time is up: {i} of {len(cases)} tables done", flush=True)
            return
        try:
            rows = measure(case, args.repeats, chunk_size)
        except torch.OutOfMemoryError:  # its inputs, or their gradients in float64
            print(f"{case.title}: does not fit, left out", end="\n\n", flush=True)
            continue
        parts.append(as_table(case, rows))
        data.append({"case": asdict(case), "rows": [asdict(row) for row in rows]})
        print(parts[-1], end="\n\n", flush=True)
        if not args.only:
            RESULTS.mkdir(exist_ok=True)
            target.write_text("\n\n".join(parts) + "\n")
            target.with_suffix(".json").write_text(json.dumps(conditions | {"tables": data}, indent=1) + "\n")


if __name__ == "__main__":
    main()
