"""Ends a run that hangs, and reports which ranks are missing, in which phase and at which line.

Every rank has a thread that posts the position of its main thread to the store of the rendezvous. The store belongs to
torchrun's agent, so it outlives the ranks. A rank whose phase lasts too long reads what the others have posted.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_opsd import events
from megatron_opsd.compat.torch_internals import rendezvous_store
from megatron_opsd.config import TimeoutsConfig
from megatron_opsd.reliability.preemption import SHOW_STACKS, PreemptionHandler

log = logging.getLogger(__name__)

POST_SECONDS = 1.0
SILENT_SECONDS = 6.0  # a rank that posts nothing for so long is stopped, dead, or blocks Python's GIL
_DONE = -1
PACKAGE = str(Path(__file__).parents[1])


class Watchdog:
    """Call ``enter`` at each phase; the thread does the rest. It ends a run with status 1 and no outcome: resumable."""

    def __init__(self, limits: TimeoutsConfig, preemption: PreemptionHandler) -> None:
        self._limits = {name: 60 * minutes for name, minutes in limits.model_dump().items()}
        self._preemption = preemption
        self._main = threading.main_thread().ident or 0
        self._posts = 0
        self.enter("start")
        self._store = rendezvous_store("watchdog")
        self._store.set_timeout(timedelta(seconds=2 * SILENT_SECONDS))
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        first = self._rank - int(os.environ["LOCAL_RANK"])
        self._neighbours = range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """Tell the watchdog that the main thread begins ``phase``, a field of ``[timeouts]``."""
        events.record("phase", phase=phase)
        self._phase, self._since = str(phase), time.monotonic()

    def close(self) -> None:
        """Tell the others that this rank is done, so that they do not count it as missing."""
        self._leaving.set()
        self._thread.join()
        self._store.set(str(self._rank), json.dumps([_DONE, self._phase, "the end", os.getpid()]))

    def _watch(self) -> None:
        while not self._leaving.wait(POST_SECONDS):
            self._post()
            phase, seconds = self._phase, time.monotonic() - self._since
            if seconds > self._limits[phase]:
                self._end(f"the phase {phase!r} has taken {seconds:.0f} s (timeouts.{phase} = {self._minutes(phase)})")
            # TERM also comes when torchrun ends the neighbours of a dead rank; NCCL would wait for the dead one.
            if self._preemption.received and self._silent(self._neighbours):
                self._end(f"after {self._preemption.name} there is nothing to wait for")

    def _minutes(self, phase: str) -> str:
        return f"{self._limits[phase] / 60:g} minutes"

    def _post(self) -> None:
        self._posts += 1
        self._store.set(str(self._rank), json.dumps([self._posts, self._phase, self._line(), os.getpid()]))

    def _line(self) -> str:
        """The line of this package at which the main thread is."""
        frame = sys._current_frames().get(self._main)
        while frame and (not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name.startswith("__")):
            frame = frame.f_back
        if frame is None:
            return "outside the package"
        file = Path(frame.f_code.co_filename).relative_to(PACKAGE)
        return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"

    def _positions(self, ranks: Iterable[int]) -> dict[int, list]:
        """[number of posts, phase, line, process id] of each rank that has posted."""
        posted = [rank for rank in ranks if self._store.check([str(rank)])]
        return {rank: json.loads(self._store.get(str(rank))) for rank in posted}

    def _silent(self, ranks: Iterable[int]) -> list[int]:
        """Those that post nothing for SILENT_SECONDS."""
        before, end = self._positions(ranks), time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end and not self._leaving.wait(POST_SECONDS):
            self._post()
        after = {} if self._leaving.is_set() else self._positions(before)
        return [rank for rank in after if after[rank][0] == before[rank][0] != _DONE]

    def _end(self, why: str) -> None:
        """The first rank that gets here reports; all exit, even if their main threads are blocked."""
        threading.Timer(5 * SILENT_SECONDS, os._exit, (1,)).start()  # in case the file system hangs
        signal.raise_signal(SHOW_STACKS)
        if self._store.add("reports", 1) > 1:
            self._leaving.wait(3 * SILENT_SECONDS)  # for the report: torchrun ends all ranks when one has exited
        else:
            everybody = range(self._world_size)
            positions, silent = self._positions(everybody), self._silent(everybody)
            report = f"opsd: {why}; {describe(positions, silent)}"
            log.critical(report)
            print(report, file=sys.stderr, flush=True)
            for rank in set(silent) & set(self._neighbours):  # a stopped process would make torchrun wait for 30 s
                with contextlib.suppress(ProcessLookupError):
                    os.kill(positions[rank][-1], signal.SIGKILL)
        os._exit(1)


def describe(positions: Mapping[int, Sequence], silent: Sequence[int]) -> str:
    """``rank 1 gives no sign of life, last in rollout at a.py:3 f; ranks 0, 2 in rollout at a.py:9 g``"""
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, (_, phase, line, *_) in positions.items():
        sign = "no sign of life, last " if rank in silent else ""
        groups[f"{sign}in {phase} at {line}"].append(rank)
    few_first = sorted(groups.items(), key=lambda group: (not group[0].startswith("no sign"), len(group[1])))
    return "; ".join(f"{_ranks(ranks)} {where}" for where, ranks in few_first)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
