"""What is private in torch. Written for 2.10 to 2.13; tests/unit/test_compat.py says when to look again."""

import io
import os
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo  # where a checkpoint's tensor lies
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.storage import TypedStorage, UntypedStorage


def rendezvous_store(prefix: str) -> PrefixStore:
    """Part of the store through which the ranks found each other. torchrun's agent keeps it, so it outlives them."""
    return PrefixStore(prefix, _get_default_store())


def join_pretended_group(rank: int, world_size: int) -> None:
    """Join a process group of a single process, which believes to be one rank of many; collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


class _FilePart(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._length - self._position]
        count = os.preadv(self._file.fileno(), [view], self._start + self._position)
        self._position += count
        return count


def load_archive(file: io.FileIO, mapped: UntypedStorage, place: StorageInfo, dtype: torch.dtype) -> Tensor:
    """What ``torch.load(mmap=True)`` does for a file, for a ``torch.save`` archive somewhere in one."""
    archive: Any = torch._C.PyTorchFileReader(_FilePart(file, place.offset, place.length))  # pyright: ignore

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _ALLOWED or (module == "torch" and name.endswith("Storage")):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")

        def persistent_load(self, pid: Any) -> TypedStorage:
            _, _, key, _, numel = pid
            at = place.offset + archive.get_record_offset(f"data/{key}")
            storage = mapped[at : at + numel * dtype.itemsize]
            return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    return Unpickler(io.BytesIO(archive.get_record("data.pkl"))).load()


_ALLOWED = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}
