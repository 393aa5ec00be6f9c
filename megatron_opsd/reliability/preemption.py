"""Signals: the cluster or a user wants the machine back. A run then saves in time and exits.

USR1 comes ``checkpoint.signal_lead_seconds`` before a job ends or is pre-empted (``sbatch --signal``). TERM and INT
come about 30 seconds before everything is killed. A second signal ends the process at once.
"""

import ctypes
import logging
import math
import os
import signal
import threading
import time

log = logging.getLogger(__name__)

SAVE_MARGIN = 1.5  # how much longer than the last save the next may take
TERM_LEAD_SECONDS = 25.0  # SLURM (KillWait) and torchrun kill after 30 s
SHOW_STACKS = signal.SIGUSR2  # a rank then writes the stacks of its threads to its log, even while it is blocked
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
# A signal may come twice: SLURM sends it to all processes of a job, and torchrun forwards its own to its workers.
ECHO_SECONDS = 5.0


def serve_parent() -> None:
    """In a helper process: ignore the signals, and end when the parent ends, even if it is killed."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class PreemptionHandler:
    """Listens for signals from its construction on. It knows only this rank's signals; the ranks agree elsewhere."""

    def __init__(self, signal_lead_seconds: float) -> None:
        short = min(TERM_LEAD_SECONDS, signal_lead_seconds)
        self._leads = {signal.SIGUSR1: signal_lead_seconds, signal.SIGTERM: short, signal.SIGINT: short}
        self._first: float | None = None
        self._deadline = math.inf
        self.name = "a signal on another rank"
        # Python runs handlers in the main thread, which may be blocked in a collective; the pipe is written at once.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in self._leads:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()

    @property
    def received(self) -> bool:
        """Whether this rank has been told to leave."""
        return self._first is not None

    def has_time_for(self, seconds: float) -> bool:
        """Whether another ``seconds`` of work would be done before this rank's deadline."""
        return time.monotonic() + seconds <= self._deadline

    def _listen(self, read_end: int) -> None:
        while number := os.read(read_end, 1):
            if number[0] in self._leads:
                self._receive(signal.Signals(number[0]))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self.name = now, number.name
            self._deadline = now + self._leads[number]
            log.warning("%s: saving and leaving within %.0f s", number.name, self._leads[number])
        elif now - self._first > ECHO_SECONDS:
            log.warning("%s: a second signal, leaving at once", number.name)
            os._exit(128 + number)
