"""Reads the pickles in Megatron's checkpoints safely: only the classes that a checkpoint needs are allowed.

A pickle can call any function of any module. torch.distributed.checkpoint's ``.metadata`` needs only a few classes. The
others (``common.pt``, extra states of Transformer Engine) can be loaded with torch's ``weights_only``. Megatron itself
loads them all without a check, so we check them first.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_opsd.errors import UserError

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_torch_type = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_torch_type or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_metadata(path: Path) -> Metadata:
    """``.metadata`` of a distributed checkpoint.

    Raises:
        UserError: the file is missing or damaged, or names something that a checkpoint does not need.
    """
    try:
        metadata = _Unpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
    except (OSError, ValueError, EOFError, KeyError, IndexError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a complete distributed checkpoint: .metadata cannot be read ({error})") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}/.metadata holds {type(metadata).__name__}, not what describes a checkpoint")
    return metadata


def refuse_foreign(path: Path) -> None:
    """Check everything in a checkpoint that Megatron would unpickle.

    Raises:
        UserError: a file contains something other than tensors and plain values.
    """
    metadata = read_metadata(path)
    _load(path / "common.pt", 0, None)
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            _load(path / place.relative_path, place.offset, place.length)


def _load(file: Path, offset: int, length: int | None) -> None:
    try:
        with file.open("rb") as data:
            data.seek(offset)
            torch.load(io.BytesIO(data.read(length)), weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: holds something else than tensors and plain values ({reason})") from error
