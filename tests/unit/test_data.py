"""Reading data sets and drawing batches from them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from megatron_opsd.config import Config, DataConfig
from megatron_opsd.data.datasets import (
    Dropped,
    check_data,
    check_grades,
    drop_long,
    load_examples,
    read_examples,
    read_held_out,
)
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.errors import UserError
from megatron_opsd.types import Example

BASE = Path(__file__).parents[2] / "examples" / "arithmetic" / "base"
ROWS = [
    {"problem": "1+1?", "solution": r"Two: \boxed{2}.", "answer": "2"},
    {"problem": "Half of one?", "solution": r"It is \boxed{\frac{1}{2}}.", "answer": "0.5"},
    {"problem": "Draw it.", "solution": "See the figure.", "answer": None},
]
GSM8K_ROWS = [{"question": "24 and 48?", "answer": "48+24 = <<48+24=72>>72\n#### 72"}]

Load = Callable[[DataConfig], object]
both = pytest.mark.parametrize("load", [load_examples, check_data])


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_json(path: Path, rows: list[Any]) -> str:
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def write_parquet(path: Path, rows: list[Any]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def fail(load: Load, config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        load(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def some_examples(count: int) -> list[Example]:
    return [Example(i, f"problem {i}", f"solution {i}") for i in range(count)]


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.json", write_json), ("lines.json", write_jsonl), ("a.parquet", write_parquet)],
)
def test_every_kind_of_file_gives_the_same_examples(
    tmp_path: Path, name: str, write: Callable[[Path, list[Any]], str]
) -> None:
    path = write(tmp_path / name, ROWS)
    config = DataConfig(path=path, answer_column="answer")
    check_data(config)
    assert load_examples(config) == [
        Example(0, "1+1?", r"Two: \boxed{2}.", "2"),
        Example(1, "Half of one?", r"It is \boxed{\frac{1}{2}}.", "0.5"),
        Example(2, "Draw it.", "See the figure.", None),
    ]
    derived = load_examples(DataConfig(path=path))
    assert [example.answer for example in derived] == ["2", r"\frac{1}{2}", None]


def test_a_folder_is_read_with_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    write_parquet(folder / "train.parquet", ROWS)
    write_parquet(folder / "test.parquet", ROWS[1:2])
    for split, count in (("train", 3), ("test", 1), ("train[:2]", 2)):
        config = DataConfig(path=str(folder), split=split)
        check_data(config)
        assert len(load_examples(config)) == count
    for load in (check_data, load_examples):
        message = fail(load, DataConfig(path=str(folder), split="validation"))
        assert f"data.path = '{folder}', split 'validation'" in message


def test_gsm8k_columns_are_mapped_and_its_ending_is_the_answer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K_ROWS)
    expected = [Example(0, "24 and 48?", GSM8K_ROWS[0]["answer"], "72")]
    assert load_examples(DataConfig(path=path, problem_column="question", solution_column="answer")) == expected
    # The same column as the answer gives the number too, not the whole text.
    config = DataConfig(path=path, problem_column="question", solution_column="answer", answer_column="answer")
    assert load_examples(config) == expected


def test_answers_may_be_numbers_of_several_kinds(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"answer": answer} for answer in (72, 0.5, "x", None)]
    config = DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows), answer_column="answer")
    assert [example.answer for example in load_examples(config)] == ["72", "0.5", "x", None]


def test_problems_as_chats_and_answers_inside_of_columns(tmp_path: Path) -> None:
    """As RL data sets have them."""
    chats = [
        "1+1?",
        [{"role": "user", "content": "1+1?"}],
        [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}],
    ]
    rows = [{"prompt": chat, "reward_model": {"style": "rule", "ground_truth": " 2 "}} for chat in chats]
    config = DataConfig(
        path=write_jsonl(tmp_path / "a.jsonl", rows),
        problem_column="prompt",
        answer_column="reward_model.ground_truth",
    )
    wanted = [Example(i, "1+1?", "", "2") for i in range(len(chats))]
    assert load_examples(config, reads="answer") == wanted
    assert check_data(config, reads="answer") == (wanted, True)
    parquet = write_parquet(tmp_path / "a.parquet", rows[1:2])
    assert load_examples(config.model_copy(update={"path": parquet}), reads="answer") == wanted[:1]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", json.dumps(ROWS[0])), ("a.json", json.dumps(ROWS)), ("b.json", json.dumps(ROWS[0]))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_examples(DataConfig(path=str(tmp_path / name)))[0].problem == "1+1?"


def test_check_reads_no_further_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opsd.data.datasets.CHECKED_ROWS", 2)
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS[:2], {"problem": 3}])
    examples, all_of_it = check_data(DataConfig(path=path))
    assert len(examples) == 2
    assert not all_of_it
    assert "a.jsonl:3" in fail(load_examples, DataConfig(path=path))


@both
def test_missing_file_and_unknown_kind_are_named(tmp_path: Path, load: Load) -> None:
    gone, text = tmp_path / "gone.jsonl", tmp_path / "notes.txt"
    text.write_text("hello")
    assert fail(load, DataConfig(path=str(gone))) == f"data.path = '{gone}': no such file, correct the path"
    message = fail(load, DataConfig(path=str(text)))
    assert message == f"data.path = '{text}': unknown kind of file, convert it to one of .jsonl, .json, .parquet"


@both
def test_missing_column_names_the_ones_there_are(tmp_path: Path, load: Load) -> None:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K_ROWS)
    message = fail(load, DataConfig(path=path))
    assert message == f"data.problem_column = 'problem': {path} has no such column; choose one of answer, question"


def test_rows_need_what_the_method_reads(tmp_path: Path) -> None:
    """Problems alone do where the teacher sees nothing, answers where it sees the answer."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    path = write_jsonl(
        tmp_path / "problems.jsonl", [{"problem": "1+1?", "answer": 2}, {"problem": "2+2?", "answer": None}]
    )
    bare, answered = DataConfig(path=path), DataConfig(path=path, answer_column="answer")
    assert [example.answer for example in read_examples(bare, tokenizer, reads="problem")] == [None, None]
    assert [example.answer for example in read_examples(answered, tokenizer, reads="problem")] == ["2", None]
    assert fail(lambda c: load_examples(c, reads="answer"), answered).startswith(
        f"{path}:2: no answer in column 'answer'"
    )
    for reads in ("answer", "solution"):
        assert "data.solution_column = 'solution'" in fail(lambda c, r=reads: check_data(c, reads=r), bare)


def test_grades_that_no_response_can_get_are_refused() -> None:
    answered, open_ended = Example(0, "1+1?", "", "2"), Example(1, "Draw it.", "", None)

    def config(**sections: Any) -> Config:
        return Config.model_validate({"model": {"path": "unread"}, "data": {"path": "data.jsonl"}} | sections)

    right, unknown = ({"method": {"train_on": [grade]}} for grade in ("right", "unknown"))
    star, siblings = {"method": {"kind": "star"}}, {"method": {"context": "sibling"}}
    curriculum = {"train": {"curriculum": {}}}
    siblings |= {"rollout": {"samples_per_prompt": 2}}
    for sections in (right, unknown, star, siblings, curriculum):
        check_grades([answered, open_ended], config(**sections))
    check_grades([open_ended], config())
    for example, sections, setting in (
        (open_ended, right, 'method.train_on = ["right"]'),
        (answered, unknown, 'method.train_on = ["unknown"]'),
        (open_ended, star, "method.kind = 'star'"),
        (open_ended, siblings, "method.context = 'sibling'"),
        (open_ended, curriculum, "train.curriculum"),
    ):
        message = fail(lambda _, e=example, s=sections: check_grades([e], config(**s)), DataConfig(path="unread"))
        assert message.startswith(f"{setting}: {example == answered:d} of 1 problems of data.jsonl")


def test_held_out_problems_need_answers_but_no_solutions(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = [{"problem": "1+1?", "answer": 2}, {"problem": "2+2?", "answer": "4"}]
    config = DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows), answer_column="answer")
    check_data(config, "evaluate.data", reads="answer")
    assert [example.answer for example in read_held_out(config, tokenizer)] == ["2", "4"]
    path = write_jsonl(tmp_path / "b.jsonl", [*rows, {"problem": "Draw it.", "answer": None}])
    config = DataConfig(path=path, answer_column="answer")
    assert fail(lambda c: read_held_out(c, tokenizer), config).startswith(f"{path}:3: no answer in column 'answer'")
    # A long solution drops nothing: nobody is shown it.
    solved = [{"problem": "1+1?", "solution": "so " * 50 + r"\boxed{2}"}]
    config = DataConfig(path=write_jsonl(tmp_path / "c.jsonl", solved), max_solution_tokens=5)
    assert [example.answer for example in read_held_out(config, tokenizer)] == ["2"]


def test_errors_name_the_section_they_were_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    config = DataConfig(path=path, answer_column="result")
    with pytest.raises(UserError, match=r"^evaluate\.data\.answer_column = 'result'"):
        check_data(config, "evaluate.data")


@both
def test_a_single_file_has_no_other_split(tmp_path: Path, load: Load) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert "data.split = 'test'" in fail(load, DataConfig(path=path, split="test"))


@both
@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json"])
def test_empty_data_is_refused(tmp_path: Path, load: Load, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n" if name.endswith("l") else "[]")
    assert "no rows" in fail(load, DataConfig(path=str(path)))


@pytest.mark.parametrize("broken", [{"problem": " "}, {"solution": None}, {"solution": ["a", "list"]}])
def test_rows_without_text_are_named_by_file_and_line(tmp_path: Path, broken: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    good, bad = json.dumps(ROWS[0]), json.dumps(ROWS[0] | broken)
    path.write_text("\n".join([good, "", bad, good, bad]))
    message = fail(load_examples, DataConfig(path=str(path)))
    ((column, value),) = broken.items()
    what = "holds a list" if isinstance(value, list) else "is empty"
    others = "(and 1 more such rows): correct it or delete the row"
    assert message == f"{path}:3: column '{column}' {what}, and text is needed {others}"
    parquet = write_parquet(tmp_path / "a.parquet", [ROWS[0] | {"solution": "1"}, ROWS[0] | {"solution": None}])
    message = fail(load_examples, DataConfig(path=parquet))
    assert message.startswith(f"{parquet}, row 2: column 'solution' is empty, and text is needed")


def test_broken_json_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"problem": \n')
    assert fail(load_examples, DataConfig(path=str(path))).startswith(f"{path}:2: not valid JSON")
    path.write_text("[1, 2]\n")
    assert fail(load_examples, DataConfig(path=str(path))).startswith(f"{path}:1: a row must be a JSON object")
    path.write_bytes(b'{"problem": "\xff"}\n')
    assert fail(load_examples, DataConfig(path=str(path))).startswith(f"{path}:1: is not UTF-8")


def test_broken_parquet_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    assert f"data.path = '{path}'" in fail(load_examples, DataConfig(path=str(path)))


def test_long_rows_are_dropped_counted_and_logged_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [("1", "2"), ("1" * 9, "2"), ("1", "2" * 9), ("1" * 9, "2" * 9), ("1" * 8, "2" * 8)]
    examples = [Example(i, problem, solution) for i, (problem, solution) in enumerate(texts)]
    with caplog.at_level(logging.INFO, logger="megatron_opsd.data.datasets"):
        kept, dropped = drop_long(examples, tokenizer, max_problem_tokens=8, max_solution_tokens=8)
    assert [example.index for example in kept] == [0, 4]
    assert dropped == Dropped(long_problems=2, long_solutions=1)
    assert [record.getMessage() for record in caplog.records] == [
        "data.max_problem_tokens = 8, data.max_solution_tokens = 8: "
        "2 of 5 examples have too long a problem, 1 a solution; 2 are kept"
    ]
    with pytest.raises(UserError, match=r"evaluate\.data\.max_problem_tokens = 8.*none is left; raise the limits"):
        drop_long(examples[1:4], tokenizer, 8, 8, "evaluate.data")

    rows = [{"problem": problem, "solution": solution} for problem, solution in texts]
    config = DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows), max_problem_tokens=8, max_solution_tokens=8)
    assert read_examples(config, tokenizer) == kept


def test_each_epoch_shows_every_example_once_in_its_own_order() -> None:
    sampler = Sampler(some_examples(10), seed=3)
    epochs = [[example.index for example in sampler.next_batch(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sampler.state_dict()["epoch"] == 2


def test_batches_cross_the_border_of_an_epoch_and_sizes_do_not_matter() -> None:
    whole = Sampler(some_examples(7), seed=0).next_batch(28)
    sampler = Sampler(some_examples(7), seed=0)
    assert [example for size in (5, 5, 1, 17) for example in sampler.next_batch(size)] == whole


def test_order_depends_on_the_seed_alone() -> None:
    examples = some_examples(20)
    assert Sampler(examples, seed=1).next_batch(40) == Sampler(examples, seed=1).next_batch(40)
    assert Sampler(examples, seed=1).next_batch(20) != Sampler(examples, seed=2).next_batch(20)
    # Written down: a new version of Python or of this package must not change what a resumed run sees.
    assert [example.index for example in Sampler(some_examples(8), seed=0).next_batch(8)] == [7, 1, 5, 3, 4, 0, 2, 6]


@pytest.mark.parametrize("drawn", [0, 3, 7, 11, 14])
def test_resumed_sampler_goes_on_where_it_stopped(drawn: int) -> None:
    first = Sampler(some_examples(7), seed=5)
    first.next_batch(drawn)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = Sampler(some_examples(7), seed=5)
    resumed.load_state_dict(state)
    assert resumed.next_batch(20) == first.next_batch(20)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Sampler(some_examples(7), seed=6), "seed 5, this run has 6"),
        (Sampler(some_examples(8), seed=5), "examples 7, this run has 8"),
        (Sampler([*some_examples(6), Example(6, "new", "text")], seed=5), "digest"),
    ],
)
def test_resuming_over_other_data_is_refused(other: Sampler, what: str) -> None:
    with pytest.raises(UserError, match=what):
        other.load_state_dict(Sampler(some_examples(7), seed=5).state_dict())
