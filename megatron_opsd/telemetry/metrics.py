"""Writes the metrics of a step to JSONL, TensorBoard, the terminal and the logs."""

import faulthandler
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from megatron_opsd import events
from megatron_opsd.config import Config
from megatron_opsd.config_file import dump_toml, with_absolute_paths
from megatron_opsd.reliability.preemption import SHOW_STACKS
from megatron_opsd.reliability.run_dir import RunDir, complete_lines, write_jsonl
from megatron_opsd.types import Evaluation, Phase, StepResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Clock:
    """Seconds of each phase of a step, measured after the device has finished its work."""

    def __init__(self, on_enter: Callable[[str], None]) -> None:
        self._on_enter, self._start = on_enter, time.perf_counter()
        self._seconds = dict.fromkeys(Phase, 0.0)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        self._on_enter(phase)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[phase] += time.perf_counter() - start

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def seconds(self) -> dict[str, float]:
        return {f"seconds_{phase}": value for phase, value in self._seconds.items()} | {"seconds_total": self.elapsed()}


class MetricsWriter:
    """metrics.jsonl, TensorBoard and the terminal. On ranks other than 0 (``enabled`` false) it does nothing.

    A resumed run drops the lines that were written after its checkpoint, so that each step appears once.
    """

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase", start: int, enabled: bool) -> None:
        self.enabled, self._tokenizer = enabled, tokenizer
        if not enabled:
            return
        self._run_dir = run_dir = RunDir(config.logging.run_dir)
        run_dir.write_config(dump_toml(with_absolute_paths(config)), start)
        self._metrics = _open_log(run_dir.metrics, start)
        self._evaluations = _open_log(run_dir.evaluations, start)
        purge = start + 1 if start else 0  # 0 purges what a start without a checkpoint has left
        self._board = SummaryWriter(str(run_dir.tensorboard), purge_step=purge) if config.logging.tensorboard else None
        self._rollouts_interval = config.logging.rollouts_interval
        self._console = Console()
        # All of it fits into 80 columns; the bar gives way.
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn())
        live = self._console.is_terminal
        self._progress = Progress(
            *columns, TextColumn("{task.fields[scores]}"), console=self._console, disable=not live, expand=True
        )
        self._task = self._progress.add_task("step", total=config.train.steps, completed=start, scores="")

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
        """Print one line on the terminal."""
        if self.enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, warnings: Sequence[str]) -> None:
        """Write one line per warning to the terminal and the log."""
        for text in warnings:
            events.record("warning", text=text)
            self.say(f"warning: {text}")

    def step(self, result: StepResult) -> None:
        """Record one step, and now and then its rollouts."""
        if not self.enabled:
            return
        step = int(result.metrics["step"])
        self._record(self._metrics, result.metrics)
        if is_due(step, self._rollouts_interval):
            write_jsonl(self._run_dir.rollouts(step), _describe(result, self._tokenizer))
        if result.metrics["skipped"]:
            write_jsonl(self._run_dir.skipped / f"step_{step:06d}.jsonl", _describe(result, self._tokenizer))
            where = self._run_dir.skipped
            self.warn([f"step {step}: loss or gradient not finite; weights unchanged, its batch is in {where}"])
        if not result.metrics["samples"]:
            grades = Counter(grade for group in result.groups for grade in group.grades)
            found = ", ".join(f"{count} {grade}" for grade, count in grades.items())
            found += ", the same in each group" if result.metrics.get("groups_without_signal") == 1 else ""
            self.warn([f"step {step}: no response to learn from ({found}); weights unchanged"])
        elif result.metrics.get("groups_without_signal") == 1 and result.metrics["grad_norm"] == 0:
            self.warn([f"step {step}: no gradient: in each group all responses are right, or none is"])
        scores = _scores(result.metrics)
        self._progress.update(self._task, completed=step, scores=scores)
        if self._progress.disable:
            self.say(f"step {step}  {scores}  {_speed(result.metrics)}")

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record the accuracies after ``step`` steps, and keep the responses in rollouts/."""
        if not self.enabled:
            return
        scores = evaluation.scores()
        self._record(self._evaluations, {"step": step, **scores})
        write_jsonl(self._run_dir.evaluation(step), evaluation.records)
        self.say(f"held-out problems after {step} steps: {format_scores(scores)}")

    def _record(self, file: TextIO, values: dict[str, float]) -> None:
        # JSON has no NaN.
        file.write(json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()}) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, int(values["step"]))


def is_due(step: int, interval: int) -> bool:
    """Whether something that happens every ``interval`` steps is due after ``step``. An interval of 0 means never."""
    return interval > 0 and step % interval == 0


def _describe(result: StepResult, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    return [
        {
            "index": group.example.index,
            "problem": group.example.problem,
            "response": tokenizer.decode(rollout.token_ids),
            "grade": grade,
            "solution_in_sight": group.solution_in_sight,
            **asdict(rollout),
        }
        for group in result.groups
        for rollout, grade in zip(group.rollouts, group.grades, strict=True)
    ]


def format_scores(scores: dict[str, float]) -> str:
    """Accuracies as text."""
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def start_logging(run_dir: RunDir, rank: int, command: str = "train") -> None:
    """Send this rank's log messages to its own file; the terminal shows only the metrics.

    The file also gets Python's warnings, and the stacks of all threads after a crash or a SHOW_STACKS signal.
    """
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir.logs / f"{command}_rank_{rank:04d}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    assert handler.stream is not None
    faulthandler.enable(handler.stream)
    faulthandler.register(SHOW_STACKS, handler.stream)
    if rank == 0 and command == "train":
        events.write_to(run_dir.events, complete_lines(run_dir.events))


def _open_log(file: Path, start: int) -> TextIO:
    lines = complete_lines(file) if start else []
    file.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
    return file.open("a", buffering=1)


def _scores(metrics: dict[str, float]) -> str:
    """What a person watches. The divergence is the one before the clip; a loss may fall while it rises."""
    names = {"loss": "loss", "divergence": "div", "accuracy": "acc"}
    digits = {"accuracy": 2}
    return "  ".join(
        f"{short} {metrics[name]:.{digits.get(name, 4)}f}" if name in metrics else f"{short} -"
        for name, short in names.items()
        if name in metrics or name == "loss"
    )


def _speed(metrics: dict[str, float]) -> str:
    phases = " ".join(f"{name} {metrics[f'seconds_{name}']:.2f}" for name in Phase)
    return (
        f"grad {metrics['grad_norm']:.2f}  {metrics['tokens_per_second']:.0f} tokens/s  "
        f"{metrics['seconds_total']:.2f} s ({phases})"
    )
