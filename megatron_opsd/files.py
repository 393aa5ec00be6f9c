"""Files of other people and programs, to read and to write beside. Every fault is a line that names file and place."""

import codecs
import json
import os
import socket
import stat
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_opsd.errors import UserError

S = TypeVar("S", bound=BaseModel)

# A byte order mark of UTF-32 starts with one of UTF-16: the longer ones first.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
LFS_POINTER = b"version https://git-lfs"  # the beginning of what git leaves in the place of a large file
_LONGEST_EXCERPT = 80  # characters of a wrong value that an error shows


class AnyObject(BaseModel):
    """A JSON object of which only that is required."""

    model_config = ConfigDict(extra="ignore")


def check_folder(path: Path, remedy: str = "correct the path") -> None:
    """Check that a path is a folder.

    Raises:
        UserError: it is a file, or there is nothing.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # also a name that is too long, or has a zero byte in it
        raise UserError(f"{path}: no such directory; {remedy}") from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a file, and a directory is needed; {remedy}")


def check_writable(file: Path, option: str) -> None:
    """Check, by writing beside it, that a new file can be written later.

    Raises:
        UserError: it exists, or its folder cannot be made or written to.
    """
    if file.is_dir():
        raise UserError(f"{option} = {file}: is a folder, and a file is needed; name a file in it")
    if os.path.lexists(file):
        raise UserError(f"{option} = {file}: exists already; remove it or name another file")
    existing = next(parent for parent in file.absolute().parents if os.path.lexists(parent))
    try_to_write(existing, f"{option} = {file}")


def try_to_write(folder: Path, what: str) -> None:
    """Write a file into a folder, and remove it again. ``what``: for which setting.

    Raises:
        UserError: it cannot be written.
    """
    probe = folder / f".probe.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise UserError(f"{what}: cannot write to {folder} ({error.strerror}); choose another folder") from None


def check_name(path: str, setting: str) -> None:
    """Check that the system can name a file so. It need not exist.

    Raises:
        UserError: the name is too long, or has a character that no name may have.
    """
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"{setting} = {excerpt(path)}: cannot be a path ({error}); correct it") from None


def read_bytes(file: Path, remedy: str = "correct the path") -> bytes:
    """The contents of a file.

    Raises:
        UserError: there is no such file, it is a folder, or it may not be read.
    """
    try:
        return file.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{file}: is a folder, and a file is needed; {remedy}") from None
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {remedy}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from None


def read_text(file: Path, remedy: str = "correct the path") -> str:
    """A text file; a byte order mark of UTF-8 is dropped.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    return decode(read_bytes(file, remedy), str(file))


def decode(data: bytes, place: str) -> str:
    """UTF-8 as text. ``place``: what an error names.

    Raises:
        UserError: it is something else.
    """
    if data.startswith(LFS_POINTER):
        raise UserError(f"{place}: is a git-lfs pointer, not the file itself; run `git lfs pull` where it came from")
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise UserError(f"{place}: is {encoding}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{place}: is not UTF-8 (byte {data[error.start]:#04x} in line {line}); save it as UTF-8"
        ) from None


def parse_json(text: str, place: str, remedy: str = "correct it") -> Any:
    """JSON as Python's values.

    Raises:
        UserError: it is none, or nested too deeply for Python.
    """
    if not text.strip():
        raise UserError(f"{place}: is empty, and JSON is needed; {remedy}")
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{place}: not valid JSON (nested too deeply); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); {remedy}") from None


def parse_toml(text: str, place: str) -> dict[str, Any]:
    """TOML as Python's values.

    Raises:
        UserError: it is none, or nested too deeply for Python.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{place}: not valid TOML (nested too deeply); correct it") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{place}: not valid TOML ({error}); correct it") from None


def read_json(file: Path, schema: type[S], remedy: str) -> S:
    """A JSON file of a model, checked against ``schema``. ``remedy``: what to do where the file is broken.

    Raises:
        UserError: names the file and, where there is one, the key, its value and what it must be.
    """
    data = read_bytes(file, remedy)
    if data.startswith(codecs.BOM_UTF8):  # transformers and vLLM would fail at it
        raise UserError(f"{file}: starts with a byte order mark, which no other program reads; save it without")
    try:
        return schema.model_validate(parse_json(decode(data, str(file)), str(file), remedy))
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error)}; {remedy}") from None


def explain(error: ValidationError) -> str:
    """The first fault that pydantic has found: key, value, and what it must be."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"the key {key} is missing"
    if first["type"] == "value_error":  # a validator's, which names the key itself
        return str(first.get("ctx", {})["error"])
    if not key:
        return f"must be a JSON object, this is {type(first['input']).__name__}"
    return f"{key} = {excerpt(first['input'])}: {first['msg']}"


def excerpt(value: Any) -> str:
    """A value as an error shows it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_EXCERPT else f"{text[:_LONGEST_EXCERPT]}..."
