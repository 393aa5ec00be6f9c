"""Rows of JSONL, JSON and parquet files, folders and data sets of the Hugging Face hub, with their places."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_opsd.config import DataConfig
from megatron_opsd.errors import UserError
from megatron_opsd.files import check_name, decode, parse_json, read_text

_FILE_TYPES = (".jsonl", ".json", ".parquet")

# A row with the place where a person finds it, as an error message should name it.
PlacedRow = tuple[str, Mapping[str, Any]]


def read_rows(config: DataConfig, section: str, preview: bool = False) -> Iterator[PlacedRow]:
    """Yield all rows with their places; with `preview` the first ones come without reading or downloading the rest.

    Raises `UserError` when the data cannot be read; `section` is the configuration section that it names.
    """
    check_name(config.path, f"{section}.path")
    path = Path(config.path)
    field, suffix = f"{section}.path = '{config.path}'", path.suffix.lower()
    if suffix not in _FILE_TYPES:
        if path.is_file():
            raise UserError(f"{field}: unknown kind of file, convert it to one of {', '.join(_FILE_TYPES)}")
        return _dataset_rows(config, section, preview)
    if path.is_dir():
        raise UserError(f"{field}: is a folder with the name of a file, rename it or name a file in it")
    if not path.is_file():
        raise UserError(f"{field}: no such file, correct the path")
    if config.split != "train":
        raise UserError(f"{section}.split = '{config.split}': a single file has the split 'train' only")
    if suffix == ".parquet":
        return _dataset_rows(config, section, preview)
    return _json_rows(path) if suffix == ".json" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[PlacedRow]:
    # Not left to `datasets`: it would drop the line numbers, and refuse a column with both numbers and texts.
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}:{number}"
                    yield _placed(place, parse_json(decode(line, place), place))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from None


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    """A list of rows; or lines as in JSONL, under this name."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        for number, row in enumerate(parse_json(text, str(path)), start=1):
            yield _placed(f"{path}, row {number}", row)
        return
    if (whole := _one_object(text)) is not None:
        keys = ", ".join(map(repr, whole))
        raise UserError(f"{path}: holds one object with the keys {keys}; write the list of rows, or a row a line")
    yield from _jsonl_rows(path)


def _one_object(text: str) -> dict[str, Any] | None:
    """The object that is all of a file and not a row: written over several lines, or around a list of rows."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # many rows, or a fault that the reader of lines has words for
        return None
    if not isinstance(whole, dict):
        return None
    lists = [value for value in whole.values() if isinstance(value, list) and value]
    around_rows = any(all(isinstance(row, dict) and "role" not in row for row in value) for value in lists)
    return whole if around_rows or "\n" in text.strip() else None


def _placed(place: str, row: Any) -> PlacedRow:
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object with the columns as keys, this is {type(row).__name__}")
    return place, row


def _dataset_rows(config: DataConfig, section: str, preview: bool) -> Iterator[PlacedRow]:
    """Rows of a parquet file, a folder or a data set on the hub, read by Hugging Face `datasets`."""
    # Here, because `datasets` takes a second to load and plain JSON does not need it.
    import datasets.config
    import datasets.exceptions
    import datasets.utils.logging
    import pyarrow

    path = Path(config.path)
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what they log of an error, the error says too
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        if path.suffix.lower() == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=config.path, split="train", streaming=True)
        elif preview and (path.is_dir() or not datasets.config.HF_HUB_OFFLINE):
            whole_split = re.split(r"[\[+]", config.split)[0]  # streams know no slices such as train[:100]
            rows = datasets.load_dataset(config.path, config.subset, split=whole_split, streaming=True)
        else:
            rows = datasets.load_dataset(config.path, config.subset, split=config.split)
        for number, row in enumerate(rows, start=1):
            yield _placed(f"{config.path}, row {number}", row)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{section}.path = '{config.path}', split '{config.split}': cannot be read as a parquet file, a "
            f"folder or a data set on the hub ({reason}); correct the path or the split, or download the data first"
        ) from error
