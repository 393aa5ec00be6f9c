"""Runs functions on several gloo ranks of this machine, as torchrun would, and fails with the rank's own traceback.

The ranks are forked from one server process that has imported Megatron-Core and vLLM, so a start takes a tenth of a
second instead of twenty seconds. On a machine with a GPU every rank is a new process: CUDA does not survive a fork.
"""

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
TERM_SECONDS = 30.0  # as in torchrun: how long the other ranks have after TERM when one has failed
_PRELOADED = "tests.distributed.preloaded"
_FORKS = not torch.cuda.is_available()
_CONTEXT: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
_CONTEXT.set_forkserver_preload([_PRELOADED])


class Ranks:
    """Runs ``worker(*args)`` in ``world_size`` processes with torchrun's variables, its store and its rules.

    ``worker`` must be a module-level function. It creates the process group itself.

    limit_file_bytes: the kernel refuses to write more than this to a file, as a full disk does.
    """

    def __init__(
        self, worker: Callable[..., None], world_size: int, *args: object, limit_file_bytes: int | None = None
    ) -> None:
        self._output = tempfile.NamedTemporaryFile(mode="r", errors="replace")  # noqa: SIM115 - until `end`
        # As with torchrun, the store outlives the ranks.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = os.environ | {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
        }
        self._processes = [
            _CONTEXT.Process(
                target=_enter,
                args=(common | {"RANK": rank, "LOCAL_RANK": rank}, self._output.name, limit_file_bytes, worker, args),
            )
            for rank in map(str, range(world_size))
        ]
        for process in self._processes:
            process.start()

    def pids(self) -> list[int]:
        """Process ids, in the order of the ranks."""
        return [process.pid for process in self._processes]

    def ended(self) -> bool:
        """Whether a rank has failed, or all have ended."""
        return self._failed() or not any(process.is_alive() for process in self._processes)

    def _failed(self) -> bool:
        return any(process.exitcode for process in self._processes)

    def finish(self, timeout: float) -> list[int]:
        """Wait for the end. Returns the exit statuses, which are negative for ranks that a signal ended.

        The first rank to fail ends the others: TERM, and KILL half a minute later.
        """
        deadline, told = time.monotonic() + timeout, False
        while running := [process for process in self._processes if process.is_alive()]:
            if self._failed() and not told:
                for process in running:
                    process.terminate()
                deadline, told = time.monotonic() + TERM_SECONDS, True
            connection.wait([process.sentinel for process in running], timeout=1)
            if time.monotonic() > deadline:
                if not told:
                    for process in running:
                        os.kill(process.pid, signal.SIGUSR2)  # faulthandler prints where it is
                    time.sleep(1)
                    self.end()
                    raise TimeoutError(f"ranks did not finish within {timeout} s:\n{self.output()}")
                for process in running:
                    process.kill()
        return [process.exitcode for process in self._processes]

    def output(self) -> str:
        """What all ranks have printed so far."""
        return Path(self._output.name).read_text(errors="replace")

    def end(self) -> None:
        """Kill all remaining ranks."""
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._output.close()


def run_distributed(worker: Callable[..., None], world_size: int, *args: object, timeout: float = 240) -> str:
    """Call ``worker(*args)`` on ``world_size`` :class:`Ranks`. Returns their output.

    Raises:
        AssertionError: a rank has failed; the message has the output of all ranks.
    """
    with Ranks(worker, world_size, *args) as ranks:
        statuses = ranks.finish(timeout)
        assert not any(statuses), f"exit statuses {statuses}\n{ranks.output()}"
        return ranks.output()


def _leave_with_the_tests() -> None:
    """End this rank when the tests are killed."""
    tests = multiprocessing.parent_process()
    assert tests
    tests.join()
    os._exit(1)


def _enter(
    environment: dict[str, str], output: str, limit_file_bytes: int | None, worker: Callable[..., None], args: tuple
) -> None:
    assert _PRELOADED in sys.modules or not _FORKS, "the server could not import what the ranks need"
    threading.Thread(target=_leave_with_the_tests, daemon=True).start()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if limit_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_bytes, limit_file_bytes))
    # Replace the server's environment: it is that of the first test, plus the variables that its imports have set.
    settings = sys.modules[_PRELOADED].SETTINGS if _FORKS else {}
    os.environ.clear()
    os.environ.update(settings | environment)
    torch.set_num_threads(1)
    worker(*args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
