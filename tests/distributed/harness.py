"""Runs a function on several gloo ranks of this machine and fails with the rank's own traceback."""

import os
import socket
import time
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _enter(rank: int, world_size: int, port: int, worker: Callable[..., None], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        worker(*args)
    except pytest.fail.Exception as failure:  # no Exception in Python's sense: the parent would not see it
        raise AssertionError(str(failure)) from failure
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_distributed(worker: Callable[..., None], world_size: int, *args: object, timeout: float = 240) -> None:
    """Call ``worker(*args)`` in ``world_size`` fresh processes with torchrun's environment variables set.

    ``worker`` must be a module-level function; it opens the process group itself. The first rank to fail
    ends the others, and its traceback becomes the error. A run that outlasts ``timeout`` seconds is ended.
    """
    context = mp.start_processes(
        _enter, args=(world_size, free_port(), worker, args), nprocs=world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + timeout
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{worker.__name__} on {world_size} ranks did not finish within {timeout} s")
