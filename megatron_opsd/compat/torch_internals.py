"""What is private in torch. Written for 2.10 to 2.13; tests/unit/test_compat.py says when to look again."""

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store


def rendezvous_store(prefix: str) -> PrefixStore:
    """Part of the store through which the ranks found each other. torchrun's agent keeps it, so it outlives them."""
    return PrefixStore(prefix, _get_default_store())


def join_pretended_group(rank: int, world_size: int) -> None:
    """Join a process group of a single process, which believes to be one rank of many; collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
