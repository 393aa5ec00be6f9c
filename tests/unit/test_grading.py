"""Finding final answers and comparing them."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_opsd.data import grading
from megatron_opsd.data.grading import extract_answer, is_correct, reference_answer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{632}.", "632"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done {x}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{}", None),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed {5}", "5"),
        ("\\boxed\n{5}", "5"),
        (r"it is \boxed 5.", "5"),
        (r"\boxed 72, so", "72"),
        (r"\boxed -1/2", "-1/2"),
        (r"$\boxed 3$", "3"),
        (r"\fbox{5}", "5"),
        (r"\boxed{1} or \fbox{2}", "2"),
        (r"\boxedtext{1}", None),
        (r"\boxed", None),
        (r"\boxed $", None),
        ("no box", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"Then \boxed{5}.", "5"),
        ("48/2 = 24\n#### 72", "72"),
        ("#### 1,000 \n", "1,000"),
        ("#### 3\nbut that is not the end", None),
        (r"\boxed{4}" + "\n#### 5", "4"),
        ("72", None),
    ],
)
def test_reference_answer(solution: str, answer: str | None) -> None:
    assert reference_answer(solution) == answer


@pytest.mark.parametrize(
    ("found", "answer", "exact", "math_verify"),
    [
        ("632", "632", True, True),
        (" 632 ", "$632$", True, True),
        ("x + 1", "x+1", True, True),
        ("6 32", "632", False, False),
        ("1 1/2", "11/2", False, False),
        ("1 1/2", "3/2", False, True),
        (r"1\frac{1}{2}", "1.5", False, True),
        (r"-2 \tfrac14", "-2.25", False, True),
        ("1½", "3/2", False, True),
        ("½", "1/2", True, True),
        ("７２", "72", True, True),
        (r"10\,000", "10000", False, True),
        ("10{,}000", "10,000", False, True),
        ("10 000", "10000", False, True),
        ("1,00", "100", False, False),
        ("1e3", "1000", False, True),
        ("2.50", "2.5", False, True),
        ("-.5", "-1/2", False, True),
        ("1/0", "1", False, False),
        ("5²", "52", False, False),
        ("9" * 5000, "9", False, False),
        ("1e999999999", "1", False, False),
        (r"\$12", "12", True, True),
        (r"\frac{1}{2}", "0.5", False, True),
        ("1,000", "1000", False, True),
        ("025", "25", False, True),
        ("x=5", "5", False, True),
        (r"3\sqrt{2}", r"\sqrt{18}", False, True),
        (r"\{2,1\}", r"\{1,2\}", False, True),
        ("73", "72", False, False),
        ("(1,2)", "(2,1)", False, False),
        (r"\notacommand{", "72", False, False),
    ],
)
def test_is_correct(found: str, answer: str, exact: bool, math_verify: bool) -> None:
    text = f"The answer is \\boxed{{{found}}}."
    assert is_correct(text, answer, "exact") is exact
    assert is_correct(text, answer, "math_verify") is math_verify


def test_no_box_is_wrong() -> None:
    assert not is_correct("The answer is 632.", "632")


def test_math_verify_works_in_many_threads() -> None:
    results: dict[int, bool] = {}

    def compare(number: int) -> None:
        results[number] = is_correct(
            rf"\boxed{{\frac{{{2 * number}x}}{{2x}}}}", str(number if number % 2 else number + 1)
        )

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number % 2 == 1 for number in range(8)}


def test_an_endless_comparison_counts_as_wrong_and_the_next_one_works() -> None:
    started = time.monotonic()
    assert not is_correct(r"\boxed{9^{9^{9^{9}}}}", "5")
    assert time.monotonic() - started < grading.SECONDS_PER_ANSWER + 20
    assert is_correct(r"\boxed{2^{10}}", "1024")


def test_a_comparer_that_cannot_start_is_an_error_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_comparer", grading._Comparer())
    monkeypatch.setattr(grading, "__file__", "/nowhere/grading.py")
    with pytest.raises(RuntimeError, match="status 2"):
        is_correct(r"\boxed{2^2}", "4")


def test_grading_loads_no_sympy_in_the_training_process() -> None:
    code = "import sys, megatron_opsd.data.grading; sys.exit('sympy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed\dfrac {3}{4}.", r"\dfrac {3}{4}"),
        (r"\boxed\text{A}", r"\text{A}"),
        (r"\boxed $5$", "$5$"),
        (r"\boxed(5)", "(5)"),
        ("\\boxed\u22125", "\u22125"),
    ],
)
def test_a_box_without_braces_around_all_of_it(text: str, found: str) -> None:
    assert extract_answer(text) == found


@pytest.mark.parametrize(
    ("found", "answer"),
    [("1, 200", "1200"), ("3, 400", "3400"), (r"1\,2", "12"), (r"1\;2", "12"), ("1~2", "12"), ("1. 5", "1.5")],
)
def test_two_numbers_are_not_one(found: str, answer: str) -> None:
    assert not is_correct(rf"\boxed{{{found}}}", answer)


@pytest.mark.parametrize(
    ("found", "answer"),
    [(r"1\ 000", "1000"), (r"10,\!000", "10000"), ("10{,}000", "10,000"), ("\u22125", "-5"), ("(1, 2)", "(1,2)")],
)
def test_one_number_in_two_ways(found: str, answer: str) -> None:
    assert is_correct(rf"\boxed{{{found}}}", answer)
