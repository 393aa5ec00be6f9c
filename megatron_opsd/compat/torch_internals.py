"""Private names of torch 2.10 to 2.13. tests/unit/test_compat.py fails when they need another look."""

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store


def rendezvous_store(prefix: str) -> PrefixStore:
    """A part of the store of the rendezvous. torchrun's agent keeps it, so it outlives the ranks."""
    return PrefixStore(prefix, _get_default_store())


def join_pretended_group(rank: int, world_size: int) -> None:
    """Make this process one rank of a fake process group of ``world_size`` ranks; collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
