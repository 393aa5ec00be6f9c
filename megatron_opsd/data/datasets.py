"""Problems with reference solutions, read from files or the Hugging Face hub."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_opsd.config import Config, DataConfig, OpsdConfig, Reads
from megatron_opsd.data import values
from megatron_opsd.data.grading import reference_answer
from megatron_opsd.data.rows import read_rows
from megatron_opsd.data.values import BadValueError, columns, find, has
from megatron_opsd.errors import UserError
from megatron_opsd.files import check_name
from megatron_opsd.types import Example, Grade

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHECKED_ROWS = 20_000  # of a file: a few seconds
CHECKED_HUB_ROWS = 100
_TOKENIZE_AT_ONCE = 1024  # examples; bounds the memory that their token ids take


def read_examples(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", section: str = "data", reads: Reads = "solution"
) -> list[Example]:
    """Read the examples within the token limits, in the order of the data; log how many were dropped.

    `section` is the configuration section that errors name. Long solutions drop nothing where nobody is shown them.
    Raises `UserError` as `load_examples` and `drop_long` do.
    """
    examples = load_examples(config, section, reads)
    max_solution_tokens = config.max_solution_tokens if reads == "solution" else None
    return drop_long(examples, tokenizer, config.max_problem_tokens, max_solution_tokens, section)[0]


def read_held_out(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Read the problems of `evaluate.data`: each needs an answer, and a solution only to read the answer from."""
    return read_examples(config, tokenizer, "evaluate.data", "answer")


def load_examples(
    config: DataConfig, section: str = "data", reads: Reads = "solution", limit: int | None = None
) -> list[Example]:
    """Read all examples in the order of the data, or those of the first `limit` rows.

    Raises `UserError` when the data cannot be read, a column is missing, or a row has no use for what `reads` names.
    """
    examples: list[Example] = []
    faults: list[str] = []
    for index, (place, row) in enumerate(islice(read_rows(config, section, preview=limit is not None), limit)):
        if index == 0:
            _check_columns(config, section, row, reads)
        try:
            examples.append(_example(config, index, row, reads))
        except BadValueError as fault:
            faults.append(f"{place}: {fault}")
    if faults:
        others = f" (and {len(faults) - 1} more such rows)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{others}: correct it or delete the row")
    if not examples:
        raise UserError(f"{section}.path = '{config.path}': no rows, give data with at least one example")
    return examples


def check_data(config: DataConfig, section: str = "data", reads: Reads = "solution") -> tuple[list[Example], bool]:
    """The examples of the first rows, as many as can be looked at in seconds, and whether these are all.

    Raises as `load_examples` does.
    """
    check_name(config.path, f"{section}.path")
    limit = CHECKED_ROWS if Path(config.path).exists() else CHECKED_HUB_ROWS
    examples = load_examples(config, section, reads, limit)
    return examples, len(examples) < limit


def check_grades(examples: Sequence[Example], config: Config) -> None:
    """Raise `UserError` where grades matter and no response to any of the examples could get one that helps."""
    method, path = config.method, config.data.path
    answered = sum(example.answer is not None for example in examples)
    found = f"{answered} of {len(examples)} problems of {path} have an answer"
    remedy = r"set data.answer_column, or end the solutions with \boxed{answer}"
    possible = set[Grade]()
    if answered:
        possible |= {Grade.RIGHT, Grade.WRONG, Grade.UNFINISHED}
    if answered < len(examples):
        possible.add(Grade.UNKNOWN)
    setting = f"method.kind = {method.kind!r}"
    if isinstance(method, OpsdConfig):
        setting = f"method.train_on = {json.dumps(method.train_on)}"
    if not possible & set(method.learns_from):
        remedy += ", or name other grades" if isinstance(method, OpsdConfig) else ""
        raise UserError(f"{setting}: {found}, so no response gets a grade to learn from; {remedy}")
    if config.reads_grades and not answered:
        setting = "train.curriculum" if config.train.curriculum else "method.context = 'sibling'"
        raise UserError(f"{setting}: {found}, so no response can be right; {remedy}, or remove it")


@dataclass(frozen=True)
class Dropped:
    """How many examples were over a token limit; one over both counts as a long problem."""

    long_problems: int
    long_solutions: int


def drop_long(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    max_problem_tokens: int,
    max_solution_tokens: int | None,
    section: str = "data",
) -> tuple[list[Example], Dropped]:
    """Keep the examples whose texts are within the limits (in tokens, the prompt's own text aside).

    Raises `UserError` when none is left.
    """
    kept, long_problems, long_solutions = [], 0, 0
    for start in range(0, len(examples), _TOKENIZE_AT_ONCE):
        some = examples[start : start + _TOKENIZE_AT_ONCE]
        problem_fits = _fits(tokenizer, [example.problem for example in some], max_problem_tokens)
        solution_fits = _fits(tokenizer, [example.solution for example in some], max_solution_tokens)
        for example, problem_ok, solution_ok in zip(some, problem_fits, solution_fits, strict=True):
            if not problem_ok:
                long_problems += 1
            elif not solution_ok:
                long_solutions += 1
            else:
                kept.append(example)
    limits = f"{section}.max_problem_tokens = {max_problem_tokens}"
    counts = f"{long_problems} of {len(examples)} examples have too long a problem"
    if max_solution_tokens is not None:
        limits += f", {section}.max_solution_tokens = {max_solution_tokens}"
        counts += f", {long_solutions} a solution"
    if examples and not kept:
        raise UserError(f"{limits}: {counts}, and none is left; raise the limits")
    logger.info("%s: %s; %d are kept", limits, counts, len(kept))
    return kept, Dropped(long_problems, long_solutions)


def _example(config: DataConfig, index: int, row: Mapping[str, Any], reads: Reads) -> Example:
    problem = _value(row, config.problem_column, values.problem)
    shown = find(row, config.solution_column)
    if reads == "solution" or (config.answer_column is None and shown is not None):
        solution = _value(row, config.solution_column, values.text)
    else:
        solution = shown if isinstance(shown, str) else ""
    if config.answer_column is None:
        answer = reference_answer(solution)
    else:
        answer = _value(row, config.answer_column, values.answer)
        # Some data sets box the answer, or repeat the whole solution in that column.
        answer = answer and (reference_answer(answer) or answer)
    if reads == "answer" and answer is None:
        raise BadValueError(f"no answer in column '{config.answer_column or config.solution_column}'")
    difficulty = None if config.difficulty_column is None else _value(row, config.difficulty_column, values.number)
    return Example(index, problem, solution, answer, difficulty)


def _value(row: Mapping[str, Any], column: str, read: Callable[[Any], T]) -> T:
    try:
        return read(find(row, column))
    except BadValueError as fault:
        raise BadValueError(f"column '{column}' {fault}") from None


def _check_columns(config: DataConfig, section: str, row: Mapping[str, Any], reads: Reads) -> None:
    wanted = {name: getattr(config, name) for name in ("problem_column", "answer_column", "difficulty_column")}
    if reads == "solution" or (reads == "answer" and config.answer_column is None):
        wanted["solution_column"] = config.solution_column
    for field, column in wanted.items():
        if column is not None and not has(row, column):
            raise UserError(
                f"{section}.{field} = '{column}': {config.path} has no such column; "
                f"choose one of {', '.join(sorted(columns(row)))}"
            )


def _fits(tokenizer: "PreTrainedTokenizerBase", texts: list[str], limit: int | None) -> list[bool]:
    if limit is None:
        return [True] * len(texts)
    return [len(ids) <= limit for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
