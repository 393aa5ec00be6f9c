"""Writes and reads Megatron's distributed checkpoints (torch_dist), one block of a tensor at a time.

torch.distributed.checkpoint writes and reads the files. It asks a planner for each tensor when it writes it, so only
one block has to be in memory. Megatron adds ``common.pt`` and ``metadata.json``.
"""

import io
import json
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils.serialization import config

from megatron_opsd.convert.blocks import Block
from megatron_opsd.errors import UserError
from megatron_opsd.files import check_folder, read_json
from megatron_opsd.reliability.pickles import read_metadata
from megatron_opsd.weights.hf_files import DTYPE_NAMES
from megatron_opsd.weights.mapping import Shape

_config: Any = config
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_checkpoint(path: Path, blocks: Sequence[Block], dtype: torch.dtype, tensors: Iterator[Tensor]) -> None:
    """Write a checkpoint; this rank contributes ``blocks``. All ranks call this together.

    tensors: the values of each block in ``dtype``, without axes for layers and experts. Each is requested when it is
        about to be written.

    Raises:
        OSError: a file cannot be written.
        UserError: ``tensors`` raised it on some rank.
    """
    try:
        # Turn off the archives' own checksums: they take half the time, and torch.load does not check them.
        with _config.patch("save.compute_crc32", False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = _BlockPlanner(blocks, dtype, tensors)
            save({}, storage_writer=FileSystemWriter(path), planner=planner, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause.__context__, OSError):  # torch.save has replaced it by another error
            cause = cause.__context__
        raise cause from None
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({}, path / "common.pt")
        (path / "metadata.json").write_text(json.dumps(_CONFIG))


class _BlockPlanner(SavePlanner):
    """Plans to write the blocks in order, and gets the tensor of each when it is written."""

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype, tensors: Iterator[Tensor]) -> None:
        self._blocks, self._dtype, self._tensors = blocks, dtype, enumerate(tensors)
        self._current = -1, torch.empty(0)
        self._place = {MetadataIndex(key, block.offset): i for i, block in enumerate(blocks) for key in block.keys}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for index, i in self._place.items():
            block = self._blocks[i]
            chunk = ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.size))
            data = TensorWriteData(chunk, TensorProperties(self._dtype), torch.Size(block.shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            if block.extra_state:
                items.append(WriteItem(MetadataIndex(block.extra_state), WriteItemType.BYTE_IO))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        wanted = self._place[write_item.index]
        if self._current[0] < wanted:  # a block with two keys is written twice in a row
            self._current = next(self._tensors)
        assert self._current[0] == wanted
        return self._current[1].reshape(self._blocks[wanted].size)


class _Format(BaseModel):
    sharded_backend: str


class DistReader:
    """Reads blocks of a checkpoint that was written with any layout.

    The model's keys may have the prefix ``model.`` and others may be there too, as in the checkpoints of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        remedy = "this is not a complete distributed checkpoint of Megatron"
        check_folder(path, remedy)
        written = read_json(path / "metadata.json", _Format, remedy).sharded_backend
        if written != "torch_dist":
            raise UserError(f"{path}: its format is {written!r}; only 'torch_dist' can be read")
        metadata = read_metadata(path)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._places = metadata.storage_data
        self._prefix = "model." if "model.embedding.word_embeddings.weight" in self._tensors else ""
        self._chunks: dict[tuple[str, int], dict[Shape, list[ChunkStorageMetadata]]] = {}
        self._files = FileSystemReader(path)
        self._files.set_up_storage_reader(metadata, is_coordinator=True)

    def _key(self, block: Block) -> str:
        keys = [self._prefix + key for key in block.keys]
        for key in keys:
            if key in self._tensors:
                return key
        raise UserError(f"{self.path}: the tensor {keys[0]} is missing; config.json calls for {list(block.shape)}")

    def dtype(self, blocks: Sequence[Block]) -> torch.dtype:
        """The dtype of all tensors of the model.

        Raises:
            UserError: they have several, or one that is not of weights.
        """
        dtypes = {self._tensors[self._key(block)].properties.dtype for block in blocks}
        if len(dtypes) > 1:
            raise UserError(f"{self.path}: has tensors of several dtypes ({', '.join(sorted(map(str, dtypes)))})")
        (dtype,) = dtypes
        if dtype not in DTYPE_NAMES:
            raise UserError(f"{self.path}: its tensors are {dtype}; only {', '.join(DTYPE_NAMES.values())} are weights")
        return dtype

    def check(self, blocks: Sequence[Block]) -> None:
        """Check that all tensors are there, their shapes and the lengths of the files, without reading any tensor.

        Raises:
            UserError: a tensor is missing, unexpected or has the wrong shape, or a file is truncated; names the first.
        """
        expected = {self._key(block): block for block in blocks}
        for key, block in expected.items():
            found = list(self._tensors[key].size)
            is_vocab = block.rule.is_vocab  # padded at its end, by an amount that depends on the layout
            if (found[1:] if is_vocab else found) != list(block.shape[is_vocab:]) or found[0] < block.shape[0]:
                raise UserError(f"{self.path}: {key} has the shape {found}; config.json calls for {list(block.shape)}")
        known = {f"{self._prefix}{key}" for block in blocks for key in block.keys}
        ours = {key for key in self._tensors if key.startswith(self._prefix) and not key.startswith("optimizer.")}
        extra = sorted(ours - known - {f"{self._prefix}output_layer.weight"})
        if extra:
            raise UserError(f"{self.path}: {len(extra)} tensors the architecture does not have, first {extra[0]}")
        ends: dict[str, int] = defaultdict(int)
        for index, place in self._places.items():
            if index.fqn in expected:
                ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file}: not found; the checkpoint is not complete")
            if file.stat().st_size < end:
                raise UserError(f"{file}: truncated; it has {file.stat().st_size} bytes and should have {end}")

    def read(self, block: Block) -> Tensor:
        """Read a block, without axes for layers and experts.

        Raises:
            UserError: the checkpoint does not contain all of it, or a file is damaged.
        """
        key = self._key(block)
        saved = self._tensors[key]
        tensor = torch.empty(block.size, dtype=saved.properties.dtype)
        near = TensorStorageMetadata(saved.properties, saved.size, self._chunks_near(key, block))
        wanted = ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.size))
        items = create_read_items_for_chunk_list(key, near, [wanted])
        if sum(item.lengths.numel() for item in items) != block.numel:
            raise UserError(f"{self.path}: {key} is not all there at {list(block.offset)}")
        for item in items:
            try:
                self._files.read_data(LoadPlan([item]), _Into(tensor))
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                place = self._places[item.storage_index]
                problem = str(error).partition("\n")[0]
                raise UserError(f"{self.path / place.relative_path}: damaged at {place.offset} ({problem})") from error
        return tensor.reshape(block.size[block.lead :])

    def _chunks_near(self, key: str, block: Block) -> list[ChunkStorageMetadata]:
        """The chunks of only the block's layer and expert, because many experts have thousands of chunks."""
        if (key, block.lead) not in self._chunks:
            index = self._chunks[key, block.lead] = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                index[tuple(chunk.offsets[: block.lead])].append(chunk)
        return self._chunks[key, block.lead].get(block.offset[: block.lead], [])


class _Into(DefaultLoadPlanner):
    """Reads everything into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._tensor
