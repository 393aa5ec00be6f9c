r"""Final answers: finding them in a response and comparing them with the reference."""

import json
import logging
import re
import resource
import signal
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from typing import Literal

Method = Literal["math_verify", "exact"]

SECONDS_PER_ANSWER = 5
_MEMORY_LIMIT = 4 * 2**30  # bytes of address space for the process that compares
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
# What follows a box without braces: $5$, (5), \frac{1}{2}, or letters and digits.
_BARE = re.compile(r"\$[^$\n]*\$|\([^()\n]*\)|\\[a-zA-Z]+(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})+|[-+\u2212]?[\w./,\\%]*\w")
_GSM8K_ENDING = re.compile(r"####[ \t]*(\S.*?)\s*\Z")
_VULGAR_FRACTION = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")
# Not all of NFKC: it would make 52 of 5².
_WIDE_OR_FRACTION = re.compile("[\uff01-\uff5e\u00bc-\u00be\u2150-\u215e]")
_LONGEST_NUMBER = 100  # characters; Python refuses to read numbers of thousands of digits
_THIN_SPACE = re.compile(r"\\[,;: ]|~")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_MIXED = re.compile(r"([-+]?)(?:(\d+) )?(\d+)/(\d+)")


def extract_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}`, braces inside it included, or None.

    The braces may be missing or stand apart: `\boxed 5`, `\boxed {5}`. A last box that is empty or never closed (a
    response cut off in the middle) gives None, not an earlier box.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        bare = _BARE.match(text, start)
        return bare[0] if bare else None
    start += 1
    depth, position = 1, start
    while position < len(text):
        char = text[position]
        if char == "\\":  # `\{` and `\}` are printed braces, they nest nothing
            position += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip() or None
        position += 1
    return None


def reference_answer(solution: str) -> str | None:
    r"""Return the final answer of a reference solution: its last `\boxed{...}`, or its `#### 72` ending, or None."""
    boxed = extract_answer(solution)
    if boxed is not None:
        return boxed
    ending = _GSM8K_ENDING.search(solution)
    return ending[1] if ending else None


def is_correct(text: str, answer: str, method: Method = "math_verify") -> bool:
    r"""Whether the last `\boxed{...}` of a response holds the reference answer.

    `exact` compares the characters; dollar signs, spaces other than between digits, and the width of characters do not
    count. `math_verify` also accepts an equal value in another form, such as `\frac{1}{2}` for `0.5`; a comparison that
    takes longer than `SECONDS_PER_ANSWER` counts as wrong. May be called from any thread. Raises `RuntimeError` when
    math-verify cannot be started.
    """
    found = extract_answer(text)
    if found is None:
        return False
    found, answer = _plain(found), _plain(answer)
    if _strip(found) == _strip(answer):
        return True
    if method == "exact":
        return False
    numbers = _number(found), _number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _comparer.same_value(found, answer)


def _plain(answer: str) -> str:
    """One way to write digits, fractions, minus and spaces; without dollar signs."""
    spaced = _VULGAR_FRACTION.sub(" ", answer.replace(r"\$", "").replace("$", ""))
    plain = _WIDE_OR_FRACTION.sub(lambda match: unicodedata.normalize("NFKC", match[0]), spaced).replace("\u2044", "/")
    return " ".join(plain.replace("\u2212", "-").split())


def _strip(answer: str) -> str:
    """Without the spaces that carry no meaning. One between two digits does: 1 1/2 is not 11/2."""
    return re.sub(r"(?<![0-9.])\s+|\s+(?![0-9\\])", "", answer)


def _number(text: str) -> Fraction | None:
    """A number in one of the ways in which people write it: 10,000, 10\\,000, 1e3, 1/2, a mixed number; else None."""
    text = _THIN_SPACE.sub(" ", text.replace(r"\!", "").replace("{,}", ","))
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip()
    if len(text) > _LONGEST_NUMBER:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    mixed = _MIXED.fullmatch(" ".join(text.split()))
    if not mixed or int(mixed[4]) == 0:
        return None
    size = int(mixed[2] or 0) + Fraction(int(mixed[3]), int(mixed[4]))
    return -size if mixed[1] == "-" else size


class _Comparer:
    r"""Runs math-verify in a process of its own, started at first use and again after each death.

    A student may write `\boxed{9^{9^{9^9}}}`, and SymPy would work it out. math-verify's own time limit works in the
    main thread only and cannot interrupt a single long multiplication; a process can always be killed.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def same_value(self, found: str, answer: str) -> bool:
        with self._lock:
            if self._process is None:
                # -P: the script's folder must not lead the import path, its types.py would hide Python's own.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            reply = _ask(self._process, found, answer)
            if reply:
                return json.loads(reply)
            status = self._process.wait()
            self._process = None
        if status > 0:
            raise RuntimeError(f"the process that compares answers ended with status {status}; its error is above")
        return False  # killed by a signal: out of time or memory


_comparer = _Comparer()


def _ask(process: "subprocess.Popen[str]", found: str, answer: str) -> str:
    """Return the reply line, empty when the process died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        print(json.dumps([found, answer]), file=process.stdin, flush=True)
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def _serve() -> None:
    """Answer one JSON line [found, answer] with `true` or `false` until the input ends."""
    import math_verify  # here, so that only this process pays for loading SymPy

    logging.disable(logging.WARNING)  # math-verify would warn that its own time limits are off
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends this process, whatever it is doing
    for news in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(news, signal.SIG_IGN)  # meant for the trainer; this process ends when the trainer's pipe closes
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    for line in sys.stdin:
        signal.alarm(SECONDS_PER_ANSWER)
        found, gold = (math_verify.parse(f"${text}$", parsing_timeout=0) for text in json.loads(line))
        same = math_verify.verify(gold, found, timeout_seconds=None)
        signal.alarm(0)
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _serve()
