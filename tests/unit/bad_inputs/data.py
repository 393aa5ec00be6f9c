"""Data files, and the values in their rows."""

import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from . import ROW, Bad, Change, Inputs


def value(what: str, column: str, wrong: Any, found: str) -> Bad:
    """A row in which one value of the third line is wrong."""
    return Bad(
        what,
        ["train.jsonl:3", f"column '{column}'", found, "correct it or delete the row"],
        lambda i: i.rows([ROW, ROW, ROW | {column: wrong}, ROW]),
    )


def chat(*roles: str, content: Any = "1+1?") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role in roles]


def file(contents: str | bytes, name: str = "train.jsonl") -> Change:
    return lambda inputs: inputs.write(name, contents)


def parquet(**columns: Any) -> Change:
    def write(inputs: Inputs) -> None:
        pq.write_table(
            pa.table({name: pa.array(values) for name, values in columns.items()}), inputs.folder / "t.parquet"
        )

    return write


def at(name: str) -> dict[str, str]:
    return {"data.path": f"{{folder}}/{name}"}


GOOD = {"problem": ["1+1?"], "solution": ["2"]}
LINE = json.dumps(ROW)

VALUES = [
    value("an answer that is a list", "answer", ["2", "3"], "holds a list, and text or a number"),
    value("an answer that is empty of anything", "answer", [], "holds a list, and text or a number"),
    value("an answer that is an object", "answer", {"ground_truth": "2"}, "holds an object"),
    value("an answer that is NaN", "answer", float("nan"), "holds nan"),
    value("an infinite answer", "answer", float("-inf"), "holds -inf"),
    value("an answer that is true", "answer", True, "holds a truth value"),
    value("an answer of half a character", "answer", "2\ud83d", "half a character"),
    value("no problem", "problem", None, "is empty"),
    value("a blank problem", "problem", " \n", "is empty"),
    value("a number as a problem", "problem", 3, "holds a number"),
    value("half a character in a problem", "problem", "1+1 \ud83d?", "half a character (character 5, \\ud83d)"),
    value("a number as a solution", "solution", 3, "holds a number"),
    value("a list as a solution", "solution", ["a", "b"], "holds a list"),
    value("half a character in a solution", "solution", "\udc00", "half a character"),
    value("a chat of two turns", "problem", chat("user", "assistant"), "holds a chat of user, assistant"),
    value("a chat with a system turn", "problem", chat("system", "user"), "prompts.student_template"),
    value("a chat of the assistant alone", "problem", chat("assistant"), "a single user turn is needed"),
    value("a chat with a picture", "problem", chat("user", content=[{"type": "image"}]), "more than text"),
    value("a chat without words", "problem", chat("user", content=""), "is empty"),
    value("a list of no messages", "problem", ["1+1?"], "holds a list, and text or a chat"),
    value("an empty list as a problem", "problem", [], "holds a list, and text or a chat"),
    Bad(
        "bytes in parquet",
        ["t.parquet, row 1", "column 'solution'", "holds bytes"],
        parquet(**GOOD | {"solution": [b"2"]}),
        at("t.parquet") | {"data.answer_column": "none"},
    ),
    Bad(
        "a list in parquet",
        ["t.parquet, row 2", "column 'answer'", "holds a list"],
        parquet(problem=["1", "2"], solution=["1", "2"], answer=[None, [Decimal(1)]]),
        at("t.parquet"),
    ),
    Bad(
        "a column inside of one that is not there",
        ["data.answer_column = 'reward_model.truth'", "reward_model.ground_truth"],
        lambda i: i.rows([ROW | {"reward_model": {"ground_truth": "2"}}]),
        {"data.answer_column": "reward_model.truth"},
    ),
    Bad(
        "an object named as a column",
        ["train.jsonl:1", "column 'reward_model'", "holds an object"],
        lambda i: i.rows([ROW | {"reward_model": {"ground_truth": "2"}}]),
        {"data.answer_column": "reward_model"},
    ),
    Bad(
        "held-out problems without answers",
        ["test.jsonl:2", "no answer in column 'answer'"],
        lambda i: i.rows([ROW, ROW | {"answer": None}], "test.jsonl"),
    ),
]

FILES = [
    Bad("utf-16", ["train.jsonl:1", "UTF-16", "save it as UTF-8"], file(LINE.encode("utf-16"))),
    Bad("utf-32", ["train.jsonl:1", "UTF-32", "save it as UTF-8"], file(LINE.encode("utf-32"))),
    Bad("latin-1", ["train.jsonl:2", "is not UTF-8 (byte 0xe9"], file(f"{LINE}\n".encode() + b'{"problem": "\xe9"}')),
    Bad("utf-16 as .json", ["t.json", "UTF-16"], file("[]".encode("utf-16"), "t.json"), at("t.json")),
    Bad("nested too deeply", ["train.jsonl:1", "nested too deeply"], file('{"problem":' + "[" * 100_000)),
    Bad("a list nested too deeply", ["t.json", "nested too deeply"], file("[" * 100_000, "t.json"), at("t.json")),
    Bad("half a line", ["train.jsonl:2", "not valid JSON"], file(f'{LINE}\n{{"problem": "1')),
    Bad("a list a line", ["train.jsonl:1", "must be a JSON object", "list"], file("[1, 2]\n")),
    Bad("a text a line", ["train.jsonl:1", "must be a JSON object", "str"], file('"1+1?"\n')),
    Bad("no rows", ["data.path", "no rows"], file("\n \n")),
    Bad("an empty list", ["data.path", "no rows"], file("[]", "t.json"), at("t.json")),
    Bad(
        "rows inside of an object",
        ["t.json", "one object with the keys 'data'", "write the list of rows"],
        file(json.dumps({"data": [ROW]}), "t.json"),
        at("t.json"),
    ),
    Bad(
        "rows inside of an object, over many lines",
        ["t.json", "one object with the keys 'version', 'data'"],
        file(json.dumps({"version": 1, "data": [ROW]}, indent=1), "t.json"),
        at("t.json"),
    ),
    Bad("a row that is a number", ["t.json, row 2", "this is int"], file(f"[{LINE}, 2]", "t.json"), at("t.json")),
    Bad("a folder with the name of a file", ["data.path", "is a folder"], file("", "t.jsonl/a"), at("t.jsonl")),
    Bad("no such file", ["data.path", "no such file"], settings=at("none.jsonl")),
    Bad("a name of thousands of letters", ["data.path", "File name too long"], settings=at("x" * 5000)),
    Bad("no path", ["data.path", "''", "at least 1 character"], settings={"data.path": ""}),
    Bad("text", ["data.path", "unknown kind of file", ".jsonl, .json, .parquet"], file("hello", "t.txt"), at("t.txt")),
    Bad("not parquet", ["t.parquet", "cannot be read as a parquet file"], file("hello", "t.parquet"), at("t.parquet")),
    Bad("half of parquet", ["t.parquet", "cannot be read"], file(b"PAR1" + bytes(99), "t.parquet"), at("t.parquet")),
    Bad("an empty folder", ["data.path", "cannot be read"], file("", "d/.keep"), at("d")),
    Bad("a git-lfs pointer", ["train.jsonl:1", "git lfs pull"], file("version https://git-lfs.github.com/spec/v1\n")),
    Bad("another split of a file", ["data.split = 'test'", "a single file"], settings={"data.split": "test"}),
    Bad(
        "no such column",
        ["data.problem_column = 'question'", "choose one of answer, problem, solution"],
        settings={"data.problem_column": "question"},
    ),
]

CURRICULUM = {"train.curriculum.window": "0.5", "data.difficulty_column": "level"}


def difficulty(what: str, value: object, *says: str) -> Bad:
    """A row in which the second problem's difficulty is no number."""
    rows = [ROW | {"level": 1}, ROW | {"level": value}, ROW | {"level": 2.5}]
    return Bad(what, ["train.jsonl:2", "column 'level'", *says], lambda inputs: inputs.rows(rows), CURRICULUM)


def without_answers(what: str, *says: str, **settings: str) -> Bad:
    """A row in which no problem has an answer."""
    rows = [ROW | {"solution": "It is 2.", "answer": None}] * 4
    return Bad(what, list(says), lambda i: i.rows(rows), {name.replace("__", "."): x for name, x in settings.items()})


METHODS = [
    Bad("no column with the difficulty", ["data.difficulty_column = 'level'", "choose one of"], settings=CURRICULUM),
    difficulty("a difficulty in words", "hard", "holds str", "a number is needed"),
    difficulty("no difficulty", None, "holds nothing", "a number is needed"),
    difficulty("a difficulty that is no number", float("nan"), "holds nan", "a finite number is needed"),
    difficulty("a difficulty that is true", True, "holds a truth value", "a number is needed"),
    without_answers("star without answers", "method.kind = 'star'", "0 of 4 problems", method__kind="star"),
    without_answers(
        "grpo without answers",
        "train.jsonl:1",
        "no answer in column 'answer'",
        method__kind="grpo",
        objective__allow_biased_sampling="true",
        rollout__samples_per_prompt="4",
    ),
    without_answers("right answers without answers", 'train_on = ["right"]', "0 of 4", method__train_on='["right"]'),
]

ROWS = VALUES + FILES + METHODS
