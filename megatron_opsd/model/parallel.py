"""Process groups, seeds, device. The only file that touches Megatron's global state."""

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_opsd.compat import cpu
from megatron_opsd.compat.torch_internals import join_pretended_group
from megatron_opsd.config import ParallelConfig
from megatron_opsd.errors import UserError
from megatron_opsd.weights.mapping import Shard

if not torch.cuda.is_available():
    cpu.install()  # before the first import of Megatron, which looks for CUDA while it is imported

from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """This rank's place in the layout, and the groups it belongs to."""

    pg_collection: ProcessGroupCollection
    rank: int
    world_size: int

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.pg_collection.tp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.pg_collection.pp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self.pg_collection.dp

    @property
    def expert_dp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same experts."""
        return self.pg_collection.expt_dp

    @property
    def ep_group(self) -> dist.ProcessGroup:
        return self.pg_collection.ep

    @property
    def shard(self) -> Shard:
        return Shard(self.tp_group.rank(), self.tp_group.size(), self.ep_group.rank(), self.ep_group.size())

    @property
    def is_last_stage(self) -> bool:
        return self.pp_group.rank() == self.pp_group.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp_group.size() - 1)


def device() -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return cpu.CPU


def initialize(config: ParallelConfig, seed: int) -> Layout:
    """Join the process group torchrun describes (or one of a single process) and build Megatron's groups.

    A second call in the same process group builds them again, for another layout.

    Raises:
        UserError: the rendezvous port is taken.
    """
    if not dist.is_initialized():
        _join(timedelta(minutes=config.timeout_minutes))
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    layout = _build_groups(config)
    seed_everything(seed)
    return layout


def _build_groups(config: ParallelConfig, create_gloo_process_groups: bool = True) -> Layout:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # experts are small: more of them on a rank before a part of one
        create_gloo_process_groups=create_gloo_process_groups,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    return Layout(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


@contextmanager
def pretended_layout(rank: int, world_size: int, config: ParallelConfig) -> Iterator[Layout]:
    """The groups as one rank of a cluster would see them, in a single process; collectives send nothing."""
    join_pretended_group(rank, world_size)
    try:
        layout = _build_groups(config, create_gloo_process_groups=False)
        seed_everything(0)
        yield layout
    finally:
        finalize()


def _join(timeout: timedelta) -> None:
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port(os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "0")))
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=timeout)
        return
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", timeout=timeout, device_id=own)  # else NCCL guesses, and barriers warn


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank. All ranks call this."""
    flags = torch.tensor([flag], dtype=torch.int32, device=device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def on_rank_0(action: Callable[[], T]) -> T:
    """Rank 0's result on all ranks, because a file system may show the others an older state.

    Raises:
        UserError: on all ranks, if the file system or ``action`` raised an error.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found = [action(), None]
        except UserError as error:
            found = [None, error]
        except OSError as error:
            found = [None, UserError(str(error))]
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron's trackers, on every rank alike where Megatron wants them alike."""
    seed %= 2**31  # NumPy takes 32 bits, and Megatron adds offsets
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def finalize() -> None:
    """Leave Megatron's groups and the process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():  # a colocated vLLM leaves it for us when it closes
        dist.destroy_process_group()


def _free_port(host: str, port: str) -> int:
    """The port, if nobody listens there; any free one for port 0."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended holds no port
        try:
            sock.bind((host, int(port)))
            return sock.getsockname()[1]
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"MASTER_PORT={port}: the port is in use on {host}; set MASTER_PORT to a free one"
            ) from error
