"""Sums over tokens, micro-batches and ranks, and where a step's numbers go: JSONL, TensorBoard, the terminal."""

import json
import logging
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megatron_opsd import parallel
from megatron_opsd.batch import Microbatch
from megatron_opsd.config import Config, dump_toml
from megatron_opsd.objective.statistics import DivergenceOutput
from megatron_opsd.parallel import Layout
from megatron_opsd.types import Evaluation, StepResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PHASES = ("rollout", "teacher", "student", "optimizer", "refit")


@dataclass(frozen=True)
class LossSums:
    """A loss and its diagnostics as sums, so that any split of the batch adds up to the same means."""

    sums: dict[str, float]
    tokens: float
    count: float
    worst_gap: float
    worst_sequence: int

    def means(self) -> dict[str, float]:
        """Means over the response tokens of the global batch; the loss as it was normalised."""
        means = {name: value / max(1.0, self.tokens) for name, value in self.sums.items()}
        return means | {"loss": self.sums["loss"] / max(1.0, self.count)}


def measure_loss(loss: Tensor, out: DivergenceOutput, microbatch: Microbatch) -> dict[str, Tensor]:
    """Sums of one micro-batch over its tokens, and the token on which training and rollout differ most."""
    assert out.student_logprobs is not None
    assert out.teacher_logprobs is not None
    gap = (out.student_logprobs - microbatch.rollout_logprobs).abs()  # [n]
    per_token = {
        "divergence": out.unclipped,
        "clip_fraction": out.clip_count > 0,
        "logprob_student": out.student_logprobs,
        "logprob_teacher": out.teacher_logprobs,
        "agreement": out.agree,
        "entropy_student": out.entropy_student,
        "entropy_teacher": out.entropy_teacher,
        "refit_logprob_gap": gap,
    }
    worst = int(gap.argmax()) if gap.numel() else None
    return {
        "loss": loss.detach().double(),
        **{name: values.sum(dtype=torch.float64) for name, values in per_token.items()},
        "tokens": torch.tensor(gap.numel()),
        "count": torch.tensor(microbatch.count),
        "worst_gap": torch.tensor(-1.0) if worst is None else gap[worst],
        "worst_sequence": torch.tensor(-1) if worst is None else microbatch.sequence[worst],
    }


def reduce_loss(reports: Sequence[dict[str, Tensor]], layout: Layout) -> LossSums:
    """Add up micro-batches and data-parallel ranks; every rank of the pipeline gets the result."""
    gathered: list[list[dict[str, float]]] = [[] for _ in range(layout.dp_group.size())]
    if layout.is_last_stage:
        own = [{name: value.item() for name, value in report.items()} for report in reports]
        dist.all_gather_object(gathered, own, group=layout.dp_group)
    dist.broadcast_object_list(gathered, src=layout.last_stage_rank, group=layout.pp_group)
    parts = [part for rank in gathered for part in rank]
    worst = max(parts, key=lambda part: part["worst_gap"])
    names = parts[0].keys() - {"tokens", "count", "worst_gap", "worst_sequence"}
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    return LossSums(
        sums={name: total[name] for name in names},
        tokens=total["tokens"],
        count=total["count"],
        worst_gap=worst["worst_gap"],
        worst_sequence=int(worst["worst_sequence"]),
    )


class Clock:
    """Seconds of each phase of a step, on a device that has finished its work."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {f"seconds_{name}": value for name, value in self._seconds.items()} | {"seconds_total": total}


def memory_peak_gib() -> float:
    """Peak memory since the start: the allocator's on a GPU, the process's on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(parallel.device()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsWriter:
    """metrics.jsonl, TensorBoard and the terminal. On ranks other than 0 (``enabled`` false) it does nothing.

    A resumed run drops the lines that were written after its checkpoint, so that each step stands once.
    """

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase", start: int, enabled: bool) -> None:
        self.enabled, self._tokenizer = enabled, tokenizer
        if not enabled:
            return
        run_dir = Path(config.logging.run_dir)
        (run_dir / "config.toml").write_text(dump_toml(config))
        self._metrics = _open_log(run_dir / "metrics.jsonl", start)
        self._evaluations = _open_log(run_dir / "evaluations.jsonl", start)
        purge = start + 1 if start else None
        self._board = (
            SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge) if config.logging.tensorboard else None
        )
        self._rollouts, self._rollouts_interval = run_dir / "rollouts", config.logging.rollouts_interval
        self._console = Console()
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        live = self._console.is_terminal
        self._progress = Progress(
            *columns, TextColumn("{task.fields[numbers]}"), console=self._console, disable=not live
        )
        self._task = self._progress.add_task("step", total=config.train.steps, completed=start, numbers="")

    def __enter__(self) -> Self:
        if self.enabled:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._progress.stop()
            self._metrics.close()
            self._evaluations.close()
            if self._board:
                self._board.close()

    def say(self, text: str) -> None:
        """One line for the reader."""
        if self.enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, result: StepResult) -> None:
        """Record one step, and now and then its rollouts."""
        if not self.enabled:
            return
        step = int(result.metrics["step"])
        self._record(self._metrics, result.metrics)
        if is_due(step, self._rollouts_interval):
            write_jsonl(self._rollouts / f"step_{step:06d}.jsonl", _describe(result, self._tokenizer))
        numbers = _numbers(result.metrics)
        self._progress.update(self._task, completed=step, numbers=numbers)
        if self._progress.disable:
            self.say(f"step {step}  {numbers}")

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record the accuracies after ``step`` steps, and keep the responses in rollouts/."""
        if not self.enabled:
            return
        scores = evaluation.scores()
        self._record(self._evaluations, {"step": step, **scores})
        write_jsonl(self._rollouts / f"evaluation_{step:06d}.jsonl", evaluation.records)
        self.say(f"held-out problems after {step} steps: {format_scores(scores)}")

    def _record(self, file: TextIO, values: dict[str, float]) -> None:
        file.write(json.dumps(values) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, int(values["step"]))


def is_due(step: int, interval: int) -> bool:
    """Whether something done every ``interval`` steps is done after ``step``; never where the interval is 0."""
    return interval > 0 and step % interval == 0


def _describe(result: StepResult, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    correct = result.correct or [None] * len(result.rollouts)
    return [
        {
            "index": example.index,
            "problem": example.problem,
            "response": tokenizer.decode(rollout.token_ids),
            "correct": right,
            **asdict(rollout),
        }
        for example, rollout, right in zip(result.examples, result.rollouts, correct, strict=True)
    ]


def write_jsonl(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def format_scores(scores: dict[str, float]) -> str:
    """Accuracies as a reader wants them."""
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def start_logging(run_dir: Path, rank: int) -> None:
    """Send this rank's messages, Python's warnings included, to a file of its own; the terminal gets the metrics."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir / "logs" / f"rank_{rank:04d}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def _open_log(file: Path, start: int) -> TextIO:
    lines = file.read_text().splitlines(keepends=True) if start and file.exists() else []
    file.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
    return file.open("a", buffering=1)


def _numbers(metrics: dict[str, float]) -> str:
    rate = metrics["tokens"] / metrics["seconds_total"]
    phases = " ".join(f"{name} {metrics[f'seconds_{name}']:.2f}" for name in PHASES)
    accuracy = f"  accuracy {metrics['accuracy']:.2f}" if "accuracy" in metrics else ""
    return (
        f"loss {metrics['loss']:.4f}{accuracy}  grad {metrics['grad_norm']:.2f}  {rate:.0f} tokens/s  "
        f"{metrics['seconds_total']:.2f} s ({phases})"
    )
