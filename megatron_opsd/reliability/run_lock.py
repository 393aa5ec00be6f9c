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
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_opsd.errors import UserError

REFRESH_SECONDS = 30.0
STALE_SECONDS = 120.0
POLL_SECONDS = 1.0
START_TIME = 19  # among the fields of /proc/PID/stat behind the name: clock ticks after the boot


class InUseError(UserError):
    """Another run owns the folder. Nothing in it was changed."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    pid: int
    machine: str  # one boot of a machine, and its namespace of process ids
    born: str  # when the process was started: process ids come again
    job: str = ""  # of SLURM
    restart: int = 0  # how often SLURM has started that job again

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> "Owner":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        job, restart = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "")
        return cls(
            socket.gethostname(),
            os.getpid(),
            machine,
            _born(os.getpid()),
            job,
            int(restart) if restart.isdecimal() else 0,
        )

    def lives_here(self) -> bool | None:
        """Whether the process lives; None where this machine cannot know."""
        if self.machine != Owner.of_this_process().machine:
            return None
        return _born(self.pid) == self.born

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def _born(pid: int) -> str:
    """When a process was started, by a clock that nobody sets; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[START_TIME - 1]


class RunLock:
    """The lock of a folder, which exists and belongs to nobody else's run from ``acquire`` to ``release``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "lock"
        self._own = Owner.of_this_process()
        self._released = threading.Event()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lock; wait where it takes time to see whether its owner lives. ``say`` tells the user.

        Raises:
            InUseError: its owner lives, or another start was faster.
        """
        if owner := self.owner():
            if not self._is_free(owner):
                self._wait_until_stale(owner, say)
            self._put_aside(owner)
        self._create()
        threading.Thread(target=self._refresh, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Leave the folder to the next run."""
        self._released.set()
        with contextlib.suppress(OSError, UserError):  # what is left is stale soon
            if self.owner() == self._own:
                self._file.unlink()

    def owner(self) -> Owner | None:
        """Who holds the lock, dead or alive."""
        return self._read(self._file)

    def is_anothers(self) -> bool:
        """Whether the lock of a run is there that may live, and to which this process does not belong."""
        owner = self.owner()
        if owner is None or owner == self._own:
            return False
        same_start = owner.job != "" and (owner.job, owner.restart) == (self._own.job, self._own.restart)
        return not same_start and not self._is_free(owner)

    def _read(self, file: Path) -> Owner | None:
        try:
            return Owner(**json.loads(file.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (IsADirectoryError, ValueError, TypeError):
            raise UserError(f"{self._file}: is not the lock of a run; remove it") from None

    def _is_free(self, owner: Owner) -> bool:
        restarted = owner.job != "" and owner.job == self._own.job and owner.restart < self._own.restart
        return owner.lives_here() is False or restarted or self._age() > STALE_SECONDS

    def _age(self) -> float:
        """Seconds since the lock was refreshed, both times by the file server's clock."""
        probe = self._unique()
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
        raise self._in_use(owner)

    def _put_aside(self, owner: Owner) -> None:
        """Remove the lock of ``owner``, of which nobody else may have made its own meanwhile."""
        aside = self._unique()
        try:
            self._file.rename(aside)  # of several starts, only one finds it
        except FileNotFoundError:
            return
        found = self._read(aside)
        if found != owner:
            with contextlib.suppress(FileExistsError):
                self._file.hardlink_to(aside)
        aside.unlink()
        if found is not None and found != owner:
            raise self._in_use(found)

    def _create(self) -> None:
        staging, text = self._unique(), json.dumps(asdict(self._own))
        staging.write_text(text)
        try:
            self._file.hardlink_to(staging)  # unlike a rename, only one of several succeeds
        except FileExistsError:
            raise self._in_use(self.owner()) from None
        except OSError:  # a file system without hard links
            with self._file.open("x") as file:
                file.write(text)
        finally:
            staging.unlink()

    def _unique(self) -> Path:
        return self._file.with_name(f".lock.{uuid.uuid4().hex}")

    def _in_use(self, owner: Owner | None) -> InUseError:
        return InUseError(
            f"logging.run_dir = {str(self._folder)!r}: {owner or 'another start'} trains there, as its file lock says; "
            "wait for its end, or choose another --logging.run_dir"
        )

    def _refresh(self) -> None:
        """A run that was stopped for minutes may have lost its folder: it ends then, before it writes there."""
        while not self._released.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError, UserError):  # the file server is away; so it is for the others
                owner = self.owner()
                if owner == self._own:
                    os.utime(self._file)
                elif owner and not self._released.is_set():
                    print(f"opsd: {self._folder}: {owner} has taken it over; leaving", flush=True)
                    os._exit(1)
                elif not self._released.is_set():  # somebody has removed it by hand
                    self._create()
