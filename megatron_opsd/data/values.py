"""The values in a row: which column they are in, and what of them is text, a problem, an answer, a number."""

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

_KINDS = {bool: "a truth value", list: "a list", dict: "an object", bytes: "bytes"}


class BadValueError(Exception):
    """A value that is not what the column must hold. The message goes behind the column's name."""


def find(row: Mapping[str, Any], column: str) -> Any:
    """The value in a column, or inside of one (``reward_model.ground_truth``). None where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def has(row: Mapping[str, Any], column: str) -> bool:
    """Whether the row has the column, with or without a value in it."""
    return column in columns(row)


def columns(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of all columns, and of what is inside of them."""
    for name, value in row.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from columns(value, f"{prefix}{name}.")


def text(value: Any) -> str:
    """Text as it is, without the spaces around it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadValueError("is empty, and text is needed")
    if not isinstance(value, str):
        raise BadValueError(f"holds {_kind(value)}, and text is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadValueError(
            f"holds half a character (character {error.start + 1}, \\u{ord(value[error.start]):x})"
        ) from None
    return value.strip()


def problem(value: Any) -> str:
    """Text, or the user's turn of a chat: a list of messages that has no other turn before it."""
    if not isinstance(value, list):
        return text(value)
    if not value or not all(isinstance(message, Mapping) and "role" in message for message in value):
        raise BadValueError("holds a list, and text or a chat (a list of messages with role and content) is needed")
    roles = [str(message["role"]) for message in value]
    if roles != ["user"]:
        raise BadValueError(
            f"holds a chat of {', '.join(roles)}, and a single user turn is needed: put the rest into "
            "prompts.student_template and prompts.teacher_template, or take it out"
        )
    content = value[0].get("content")
    if not isinstance(content, list):
        return text(content)
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise BadValueError("holds a chat with more than text, and only text can be shown to these models")
    return text("".join(text(part.get("text")) for part in content))


def answer(value: Any) -> str | None:
    """Text, or a finite number as text; None where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not isinstance(value, int) and not math.isfinite(value):
            raise BadValueError(f"holds {value}, which is no number an answer can be compared with")
        return str(value)
    if not isinstance(value, str):
        raise BadValueError(f"holds {_kind(value)}, and text or a number is needed")
    return text(value)


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise BadValueError(f"holds {_kind(value) if value is not None else 'nothing'}, and a number is needed")
    if not isinstance(value, int) and not math.isfinite(value):
        raise BadValueError(f"holds {value}, and a finite number is needed")
    return float(value)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
