"""One living run a folder: a lock file that says whose it is, and is refreshed while that run lives.

Whether the file is old is judged by the file server's clock, because the nodes' clocks may differ. On the machine of
the lock's process it is known at once whether the process lives. Elsewhere a lock is left behind if nobody refreshes it
for ``STALE_SECONDS``. A job that SLURM has started again takes its own earlier start's lock at once.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_opsd.errors import UserError

REFRESH_SECONDS = 30.0
STALE_SECONDS = 120.0
SETTLE_SECONDS = 0.2  # two that take over a stale lock at once: the later one wins, and the other sees it
POLL_SECONDS = 1.0


class InUseError(UserError):
    """Another run owns the folder. Nothing in it was changed."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    pid: int
    machine: str  # one boot of a machine, and its namespace of process ids
    born: float  # when the process was started: process ids come again
    job: str = ""  # of SLURM
    restart: int = 0  # how often SLURM has started that job again

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> "Owner":
        boot = Path("/proc/sys/kernel/random/boot_id")
        namespace = Path("/proc/self/ns/pid")
        machine = f"{boot.read_text().strip()} {namespace.readlink()}" if boot.exists() else socket.gethostname()
        job, restart = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
        return cls(socket.gethostname(), os.getpid(), machine, psutil.Process().create_time(), job, int(restart))

    def lives_here(self) -> bool | None:
        """Whether the process lives; None where this machine cannot know."""
        if self.machine != Owner.of_this_process().machine:
            return None
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """The lock of a folder, which exists and belongs to nobody else's run from ``acquire`` to ``release``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "lock"
        self._own = Owner.of_this_process()
        self._released = threading.Event()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lock; wait where it takes time to see whether its owner lives. ``say`` tells the user.

        Raises:
            InUseError: its owner lives.
        """
        owner = self.owner()
        if owner and not self._is_free(owner):
            self._wait_until_stale(owner, say)
        self._write(taken_over=owner is not None)
        if owner:
            time.sleep(SETTLE_SECONDS)
            self._check()
        threading.Thread(target=self._refresh, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Leave the folder to the next run."""
        self._released.set()
        if self.owner() == self._own:
            self._file.unlink()

    def owner(self) -> Owner | None:
        """Who holds the lock, dead or alive."""
        try:
            return Owner(**json.loads(self._file.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError):
            raise UserError(f"{self._file}: is not the lock of a run; remove it") from None

    def is_anothers(self) -> bool:
        """Whether the lock of a process is there that may live, other than this one."""
        owner = self.owner()
        return owner is not None and owner != self._own and not self._is_free(owner)

    def _is_free(self, owner: Owner) -> bool:
        restarted = owner.job != "" and owner.job == self._own.job and owner.restart < self._own.restart
        return owner.lives_here() is False or restarted or self._age() > STALE_SECONDS

    def _age(self) -> float:
        """Seconds since the lock was refreshed, both times by the file server's clock."""
        probe = self._file.with_name(f".lock.{self._own.host}.{self._own.pid}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:  # released meanwhile
            return float("inf")
        finally:
            probe.unlink()

    def _wait_until_stale(self, owner: Owner, say: Callable[[str], None]) -> None:
        age = self._age()
        if owner.lives_here() is None:
            say(f"{self._folder}: {owner} has it; seeing for up to {STALE_SECONDS - age:.0f} s whether it lives")
            while age <= STALE_SECONDS:
                time.sleep(POLL_SECONDS)
                earlier, age = age, self._age()
                if age < earlier:
                    break  # refreshed
            else:
                return
        raise InUseError(
            f"logging.run_dir = {str(self._folder)!r}: {owner} trains there, as its file lock says; wait for its end, "
            "or choose another --logging.run_dir"
        )

    def _write(self, taken_over: bool) -> None:
        staging = self._file.with_name(f".lock.{self._own.host}.{self._own.pid}")
        staging.write_text(json.dumps(asdict(self._own)))
        try:
            if taken_over:
                staging.replace(self._file)
            else:
                self._file.hardlink_to(staging)  # unlike a rename, only one of two succeeds
        except FileExistsError:
            self._check()
        finally:
            staging.unlink(missing_ok=True)

    def _check(self) -> None:
        if (owner := self.owner()) != self._own:
            raise InUseError(
                f"logging.run_dir = {str(self._folder)!r}: {owner} has just started there; choose another "
                "--logging.run_dir"
            )

    def _refresh(self) -> None:
        """A run that was stopped for minutes may have lost its folder: it ends then, before it writes there."""
        while not self._released.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):  # the file server is away; so it is for the others
                if self.owner() != self._own:
                    print(f"opsd: {self._folder}: {self.owner()} has taken it over; leaving", flush=True)
                    os._exit(1)
                os.utime(self._file)
