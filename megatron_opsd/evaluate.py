"""Greedy accuracy and Avg@k of whatever weights an engine holds."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_opsd.config import Config, ParallelConfig
from megatron_opsd.data.datasets import read_held_out
from megatron_opsd.data.grading import Method, is_correct
from megatron_opsd.data.prompts import PromptBuilder, build_prompts, max_model_len
from megatron_opsd.model import parallel
from megatron_opsd.reliability.run_dir import RunDir, write_jsonl
from megatron_opsd.rollout import build_engine
from megatron_opsd.rollout.engine import Engine, Sampling, sample_seed
from megatron_opsd.telemetry.metrics import format_scores, start_logging
from megatron_opsd.types import Evaluation, Example, Rollout
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.mapping import NameTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEAK_SECONDS = 30.0  # between two lines of progress where there is no terminal


def evaluate(
    engine: Engine,
    prompts: PromptBuilder,
    examples: Sequence[Example],
    config: Config,
    should_abort: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Answer every example once greedily and ``evaluate.samples`` times sampled. All ranks call this together."""
    settings = config.evaluate
    limit = settings.max_response_tokens or config.rollout.max_response_tokens
    ids = [prompts.student(example) for example in examples]
    rollouts = engine.generate(ids, Sampling(limit, temperature=0.0), [0] * len(ids), should_abort)
    repeated = [i for i in range(len(ids)) for _ in range(settings.samples)]
    rollouts += engine.generate(
        [ids[i] for i in repeated],
        Sampling(limit, settings.temperature, settings.top_p, settings.top_k),
        [sample_seed(config.train.seed, 0, i) for i in range(len(repeated))],
        should_abort,
    )
    asked = [*examples, *(examples[i] for i in repeated)]
    right = grade(rollouts, asked, prompts.tokenizer, settings.answer_check)
    records = [
        {
            "index": example.index,
            "sampling": "greedy" if i < len(ids) else "sampled",
            "problem": example.problem,
            "answer": example.answer,
            "response": prompts.tokenizer.decode(rollout.token_ids, skip_special_tokens=True),
            "tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "correct": correct,
        }
        for i, (example, rollout, correct) in enumerate(zip(asked, rollouts, right, strict=True))
    ]
    return Evaluation(
        greedy=_mean(right[: len(ids)]),
        average=_mean(right[len(ids) :]),
        response_length=_mean([len(rollout.token_ids) for rollout in rollouts]),
        records=records,
    )


def grade(
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    answer_check: Method,
) -> list[bool]:
    """Whether each rollout ends in its example's answer; the ranks share the work. All ranks call this together."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = [
        example.answer is not None
        and is_correct(str(tokenizer.decode(rollout.token_ids, skip_special_tokens=True)), example.answer, answer_check)
        for rollout, example in list(zip(rollouts, examples, strict=True))[rank::world_size]
    ]
    parts: list[list[bool]] = [[] for _ in range(world_size)]
    dist.all_gather_object(parts, own)
    return [parts[i % world_size][i // world_size] for i in range(len(rollouts))]


class _Progress:
    """Shows on rank 0 how many responses are written, and the time left."""

    def __init__(self, engine: Engine, total: int, rank: int) -> None:
        columns = (TextColumn("responses"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._engine, self._before, self._last, self._said = engine, 0, 0, time.monotonic()
        self._bar = Progress(*columns, disable=rank > 0 or not Console().is_terminal)
        self._task = self._bar.add_task("", total=total)
        self._speaks = rank == 0 and not Console().is_terminal
        self._start, self._total = time.monotonic(), total

    def update(self) -> bool:
        """Called by the engine while it writes. Returns False: an evaluation is never given up."""
        if self._engine.finished < self._last:  # another call of ``generate``
            self._before += self._last
        self._last = self._engine.finished
        done, now = min(self._before + self._last, self._total), time.monotonic()
        self._bar.update(self._task, completed=done)
        if self._speaks and done and now - self._said >= SPEAK_SECONDS:
            self._said = now
            left = (now - self._start) * (self._total / done - 1)
            print(f"{done} of {self._total} responses are written; about {left / 60:.1f} minutes left", flush=True)
        return False

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def evaluate_checkpoint(config: Config, out: Path | None) -> Evaluation:
    """Evaluate the Hugging Face directory ``model.path`` on ``evaluate.data``; rank 0 prints and writes ``out``."""
    assert config.evaluate.data
    timeout = config.parallel.timeout_minutes
    layout = parallel.initialize(ParallelConfig(timeout_minutes=timeout), config.train.seed)
    start_logging(RunDir(config.logging.run_dir), layout.rank, "evaluate")
    prompts = build_prompts(config)
    examples = read_held_out(config.evaluate.data, prompts.tokenizer)[: config.evaluate.limit]
    table, reader = NameTable(read_architecture(config.model.path)), HFReader(config.model.path)
    expected = table.hf_tensors()
    reader.check(expected)
    reader.check_tied_head(table.arch)
    engine = build_engine(config, max_model_len(config, prompts, train=False))
    engine.update_weights(((name, reader.read(name).to(parallel.device())) for name in expected), version=0)
    with _Progress(engine, len(examples) * (1 + config.evaluate.samples), layout.rank) as progress:
        evaluation = evaluate(engine, prompts, examples, config, progress.update)
    if layout.rank == 0:
        if out:
            write_jsonl(out, evaluation.records)
        print(f"{config.model.path} on {len(examples)} problems: {format_scores(evaluation.scores())}")
    engine.close()
    parallel.finalize()
    return evaluation
