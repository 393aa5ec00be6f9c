"""Problems with reference solutions, read from files or the Hugging Face hub."""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opsd.config import DataConfig, Reads
from megatron_opsd.data.grading import reference_answer
from megatron_opsd.errors import UserError
from megatron_opsd.types import Example, Grade

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FILE_TYPES = (".jsonl", ".json", ".parquet")
_TOKENIZE_AT_ONCE = 1024  # examples; bounds the memory that their token ids take

# A row with the place where a person finds it, as an error message should name it.
_PlacedRow = tuple[str, Mapping[str, Any]]


def read_examples(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", section: str = "data", reads: Reads = "solution"
) -> list[Example]:
    """Read the examples within the token limits, in the order of the data; log how many were dropped.

    `section` is the configuration section that errors name. Long solutions drop nothing where nobody is shown them.
    Raises `UserError` as `load_examples` and `drop_long` do.
    """
    examples = load_examples(config, section, reads)
    max_solution_tokens = config.max_solution_tokens if reads == "solution" else sys.maxsize
    return drop_long(examples, tokenizer, config.max_problem_tokens, max_solution_tokens, section)[0]


def read_held_out(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Read the problems of `evaluate.data`: each needs an answer, and a solution only to read the answer from."""
    return read_examples(config, tokenizer, "evaluate.data", "answer")


def load_examples(config: DataConfig, section: str = "data", reads: Reads = "solution") -> list[Example]:
    """Read all examples in the order of the data.

    Raises `UserError` when the data cannot be read, a column is missing, or a row lacks its problem or what `reads`
    names.
    """
    examples: list[Example] = []
    faults: list[str] = []
    for index, (place, row) in enumerate(_rows(config, section)):
        if index == 0:
            _check_columns(config, section, row, reads)
        texts = [config.problem_column, *([config.solution_column] if reads == "solution" else [])]
        empty = [column for column in texts if not _is_text(row.get(column))]
        if empty:
            faults.append(f"{place}: no text in column '{empty[0]}'")
            continue
        example = _example(config, index, row)
        if reads == "answer" and example.answer is None:
            faults.append(f"{place}: no answer in column '{config.answer_column or config.solution_column}'")
        else:
            examples.append(example)
    if faults:
        others = f" (and {len(faults) - 1} more such rows)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{others}: fill it in or delete the row")
    if not examples:
        raise UserError(f"{section}.path = '{config.path}': no rows, give data with at least one example")
    return examples


def check_grades(examples: Sequence[Example], train_on: Sequence[Grade], path: str) -> None:
    """Raise `UserError` where no response to any of the examples could get a grade of `train_on`."""
    answered = sum(example.answer is not None for example in examples)
    possible = set[Grade]()
    if answered:
        possible |= {Grade.RIGHT, Grade.WRONG, Grade.UNFINISHED}
    if answered < len(examples):
        possible.add(Grade.UNKNOWN)
    if not possible & set(train_on):
        raise UserError(
            f"method.train_on = {json.dumps(train_on)}: {answered} of {len(examples)} problems of {path} have an "
            "answer, so no response gets such a grade; set data.answer_column, or other grades"
        )


def check_data(config: DataConfig, section: str = "data", reads: Reads = "solution") -> None:
    """Raise `UserError` unless the data opens and its first row has the columns. Reads no further than that row."""
    first = next(_rows(config, section, preview=True), None)
    if first is None:
        raise UserError(f"{section}.path = '{config.path}': no rows, give data with at least one example")
    _check_columns(config, section, first[1], reads)


@dataclass(frozen=True)
class Dropped:
    """How many examples were over a token limit; one over both counts as a long problem."""

    long_problems: int
    long_solutions: int


def drop_long(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    max_problem_tokens: int,
    max_solution_tokens: int,
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
    limits = (
        f"{section}.max_problem_tokens = {max_problem_tokens}, {section}.max_solution_tokens = {max_solution_tokens}"
    )
    counts = f"{long_problems} of {len(examples)} examples have too long a problem, {long_solutions} a solution"
    if examples and not kept:
        raise UserError(f"{limits}: {counts}, and none is left; raise the limits")
    logger.info("%s: %s; %d are kept", limits, counts, len(kept))
    return kept, Dropped(long_problems, long_solutions)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _example(config: DataConfig, index: int, row: Mapping[str, Any]) -> Example:
    problem, solution = row[config.problem_column].strip(), str(row.get(config.solution_column) or "").strip()
    if config.answer_column is None:
        return Example(index, problem, solution, reference_answer(solution))
    value = row.get(config.answer_column)
    answer = "" if value is None else str(value).strip()
    # Some data sets box the answer, or repeat the whole solution in that column.
    return Example(index, problem, solution, reference_answer(answer) or answer or None)


def _check_columns(config: DataConfig, section: str, row: Mapping[str, Any], reads: Reads) -> None:
    columns = {"problem_column": config.problem_column, "answer_column": config.answer_column}
    if reads == "solution" or (reads == "answer" and config.answer_column is None):
        columns["solution_column"] = config.solution_column
    for field, column in columns.items():
        if column is not None and column not in row:
            raise UserError(
                f"{section}.{field} = '{column}': {config.path} has no such column; "
                f"choose one of {', '.join(sorted(row))}"
            )


def _fits(tokenizer: "PreTrainedTokenizerBase", texts: list[str], limit: int) -> list[bool]:
    return [len(ids) <= limit for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _rows(config: DataConfig, section: str, preview: bool = False) -> Iterator[_PlacedRow]:
    """Yield all rows with their places; with `preview` the first ones come without reading or downloading the rest."""
    path = Path(config.path)
    field = f"{section}.path = '{config.path}'"
    if path.suffix not in _FILE_TYPES:
        if path.is_file():
            raise UserError(f"{field}: unknown kind of file, convert it to one of {', '.join(_FILE_TYPES)}")
        return _dataset_rows(config, section, preview)
    if not path.is_file():
        raise UserError(f"{field}: no such file, correct the path")
    if config.split != "train":
        raise UserError(f"{section}.split = '{config.split}': a single file has the split 'train' only")
    if path.suffix == ".parquet":
        return _dataset_rows(config, section, preview)
    if path.suffix == ".json" and path.read_bytes().lstrip()[:1] == b"[":
        return _json_rows(path)
    return _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[_PlacedRow]:
    # Not left to `datasets`: it would drop the line numbers, and refuse a column with both numbers and texts.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _placed(f"{path}:{number}", _parse(f"{path}:{number}", line))


def _json_rows(path: Path) -> Iterator[_PlacedRow]:
    for number, row in enumerate(_parse(str(path), path.read_bytes()), start=1):
        yield _placed(f"{path}, row {number}", row)


def _parse(place: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); correct it") from None


def _placed(place: str, row: Any) -> _PlacedRow:
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object with the columns as keys, this is {type(row).__name__}")
    return place, row


def _dataset_rows(config: DataConfig, section: str, preview: bool) -> Iterator[_PlacedRow]:
    """Rows of a parquet file, a folder or a data set on the hub, read by Hugging Face `datasets`."""
    # Here, because `datasets` takes a second to load and plain JSON does not need it.
    import datasets.config
    import datasets.exceptions

    path = Path(config.path)
    try:
        if path.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=config.path, split="train", streaming=True)
        elif preview and (path.is_dir() or not datasets.config.HF_HUB_OFFLINE):
            whole_split = re.split(r"[\[+]", config.split)[0]  # streams know no slices such as train[:100]
            rows = datasets.load_dataset(config.path, config.subset, split=whole_split, streaming=True)
        else:
            rows = datasets.load_dataset(config.path, config.subset, split=config.split)
        for number, row in enumerate(rows, start=1):
            yield _placed(f"{config.path}, row {number}", row)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{section}.path = '{config.path}', split '{config.split}': cannot be read as a parquet file, a "
            f"folder or a data set on the hub ({reason}); correct the path or the split, or download the data first"
        ) from error
