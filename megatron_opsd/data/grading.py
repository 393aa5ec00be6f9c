r"""Final answers: finding them in a response and comparing them with the reference."""

import json
import logging
import re
import resource
import signal
import subprocess
import sys
import threading
from typing import Literal

Method = Literal["math_verify", "exact"]

SECONDS_PER_ANSWER = 5
_MEMORY_LIMIT = 4 * 2**30  # bytes of address space for the process that compares
_BOX = r"\boxed{"
_GSM8K_ENDING = re.compile(r"####[ \t]*(\S.*?)\s*\Z")


def extract_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, braces inside it included, or None.

    A last box that is empty or never closed (a response cut off in the middle) gives None, not an earlier box.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
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

    `exact` compares the characters, spaces and dollar signs aside. `math_verify` also accepts an equal value in
    another form, such as `\frac{1}{2}` for `0.5`; a comparison that takes longer than `SECONDS_PER_ANSWER` counts as
    wrong. May be called from any thread. Raises `RuntimeError` when math-verify cannot be started.
    """
    found = extract_answer(text)
    if found is None:
        return False
    found, answer = _strip(found), _strip(answer)
    if found == answer:
        return True
    return method == "math_verify" and _comparer.same_value(found, answer)


def _strip(answer: str) -> str:
    return "".join(answer.replace(r"\$", "").replace("$", "").split())


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
