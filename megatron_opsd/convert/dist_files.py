"""Megatron's distributed checkpoints (torch_dist): blocks of tensors written and read one at a time.

The format is torch.distributed.checkpoint's: ``.distcp`` files hold one ``torch.save`` archive after the other, and
``.metadata`` says which block of which tensor lies where. Megatron adds ``common.pt`` and ``metadata.json``. Torch's
own writer keeps every tensor until it has written all, its reader takes whole archives into memory; hence these two.
"""

import io
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.storage import UntypedStorage
from torch.utils.serialization import config

from megatron_opsd.compat.torch_internals import StorageInfo, load_archive
from megatron_opsd.convert.blocks import Block
from megatron_opsd.errors import UserError
from megatron_opsd.reliability.pickles import read_metadata
from megatron_opsd.weights.mapping import Shape
from megatron_opsd.weights.output import Output

_config: Any = config
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Places = dict[MetadataIndex, StorageInfo]


class DistWriter:
    """Writes one rank's blocks into a ``.distcp`` file, one after the other."""

    def __init__(self, path: Path, rank: int) -> None:
        self.name = f"__{rank}_0.distcp"
        self._file = Output(path / self.name)
        self.places: Places = {}
        empty = io.BytesIO()
        torch.save([None], empty)
        self._empty = self._append(lambda: self._file.write(empty.getbuffer()))

    def _append(self, write: Any) -> StorageInfo:
        start = self._file.tell()
        write()
        return StorageInfo(self.name, start, self._file.tell() - start)

    def write(self, block: Block, tensor: Tensor) -> None:
        """Write a block; ``tensor`` has its size, layers and experts aside."""
        tensor = _own_storage(tensor).view(block.size)

        def save() -> None:
            try:
                # Without the archive's own checksum, which torch.load does not look at and which takes half the time.
                with _config.patch("save.compute_crc32", False):
                    torch.save(tensor, self._file)  # pyright: ignore[reportArgumentType]
            except RuntimeError as error:  # torch's words for what the file answered
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

        place = self._append(save)
        for key in filter(None, (block.key, block.other_key)):
            self.places[MetadataIndex(key, block.offset)] = place
        if block.extra_state:
            self.places[MetadataIndex(block.extra_state)] = self._empty

    def close(self) -> None:
        """Returns when the file is on the disk."""
        self._file.close()


def write_metadata(path: Path, blocks: Iterable[Block], dtype: torch.dtype, places: Places) -> None:
    """Write what makes ``path`` a checkpoint once all ranks' files are there."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for block in blocks:
        for key in filter(None, (block.key, block.other_key)):
            entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(dtype), torch.Size(block.shape), []))
            assert isinstance(entry, TensorStorageMetadata)
            entry.chunks.append(ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.size)))
        if block.extra_state:
            entries[block.extra_state] = BytesStorageMetadata()
    metadata = Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(_CONFIG))


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor on a storage of its own size: ``torch.save`` writes the storage, and a view's would be all of it."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)  # pyright: ignore


class DistReader:
    """Reads blocks of a checkpoint that any layout has written, through mapped files.

    The model may lie under ``model.`` among other things, as in the checkpoints of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            config = json.loads((path / "metadata.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: not a complete distributed checkpoint of Megatron: metadata.json cannot be read ({error})"
            ) from error
        metadata = read_metadata(path)
        if config.get("sharded_backend") != "torch_dist":
            raise UserError(f"{path}: its format is {config.get('sharded_backend')!r}; only 'torch_dist' can be read")
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._places: Places = metadata.storage_data
        self._prefix = "model." if "model.embedding.word_embeddings.weight" in self._tensors else ""
        self._chunks: dict[tuple[str, int], dict[Shape, list[ChunkStorageMetadata]]] = {}
        self._files: dict[str, tuple[io.FileIO, UntypedStorage]] = {}

    def _key(self, block: Block) -> str:
        keys = [self._prefix + key for key in (block.key, block.other_key) if key]
        for key in keys:
            if key in self._tensors:
                return key
        raise UserError(f"{self.path}: the tensor {keys[0]} is missing; config.json calls for {list(block.shape)}")

    def dtype(self, blocks: Sequence[Block]) -> torch.dtype:
        """The one dtype of the model's tensors."""
        dtypes = {self._tensors[self._key(block)].properties.dtype for block in blocks}
        if len(dtypes) > 1:
            raise UserError(f"{self.path}: has tensors of several dtypes ({', '.join(sorted(map(str, dtypes)))})")
        return dtypes.pop()

    def check(self, blocks: Sequence[Block]) -> None:
        """Look for all tensors, their shapes, and the ends of the files, without reading any.

        Raises:
            UserError: what is missing, misshapen, superfluous or cut off, first of its kind.
        """
        expected = {self._key(block): block for block in blocks}
        for key, block in expected.items():
            found = list(self._tensors[key].size)
            is_vocab = block.rule.is_vocab  # padded at its end, more or less
            if (found[1:] if is_vocab else found) != list(block.shape[is_vocab:]) or found[0] < block.shape[0]:
                raise UserError(f"{self.path}: {key} has the shape {found}; config.json calls for {list(block.shape)}")
        known = expected.keys() | {f"{self._prefix}{block.other_key}" for block in blocks if block.other_key}
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
        """The block, without axes for layers and experts. Where it was written as one, its memory is the file's.

        Raises:
            UserError: the file does not hold all of it, or is damaged.
        """
        key = self._key(block)
        whole: Tensor | None = None
        filled = 0
        for chunk, start, lengths in self._overlaps(key, block):
            part = self._read_chunk(key, chunk)
            for axis, (at, offset, length) in enumerate(zip(start, chunk.offsets, lengths, strict=True)):
                part = part.narrow(axis, at - offset, length)
            filled += part.numel()
            if part.numel() == block.numel:
                whole = part
                break
            whole = torch.empty(block.size, dtype=part.dtype) if whole is None else whole
            target = tuple(slice(s - o, s - o + n) for s, o, n in zip(start, block.offset, lengths, strict=True))
            whole[target] = part
        if whole is None or filled != block.numel:
            raise UserError(f"{self.path}: {key} is not all there at {list(block.offset)}")
        return whole.reshape(block.size[block.lead :])

    def prefetch(self, block: Block) -> None:
        """Have the disk read what :meth:`read` will want."""
        key = self._key(block)
        for chunk, _, _ in self._overlaps(key, block):
            place = self._places[MetadataIndex(key, chunk.offsets)]
            file, _ = self._open(place.relative_path)
            os.posix_fadvise(file.fileno(), place.offset, place.length, os.POSIX_FADV_WILLNEED)

    def _overlaps(self, key: str, block: Block) -> Iterator[tuple[ChunkStorageMetadata, list[int], list[int]]]:
        """The chunks that hold parts of the block; where in the tensor each part starts, and its size."""
        for chunk in self._chunks_near(key, block):
            start = [max(a, b) for a, b in zip(block.offset, chunk.offsets, strict=True)]
            ends = zip(block.offset, block.size, chunk.offsets, chunk.sizes, strict=True)
            lengths = [min(a + n, b + m) - s for (a, n, b, m), s in zip(ends, start, strict=True)]
            if min(lengths) > 0:
                yield chunk, start, lengths

    def _chunks_near(self, key: str, block: Block) -> list[ChunkStorageMetadata]:
        """The chunks of the block's layer and expert."""
        if (key, block.lead) not in self._chunks:
            index = self._chunks[key, block.lead] = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                index[tuple(chunk.offsets[: block.lead])].append(chunk)
        return self._chunks[key, block.lead].get(block.offset[: block.lead], [])

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        file, mapped = self._open(place.relative_path)
        try:
            tensor = load_archive(file, mapped, place, self._tensors[key].properties.dtype)
        except (RuntimeError, pickle.UnpicklingError) as error:
            problem = str(error).partition("\n")[0]
            raise UserError(f"{self.path / place.relative_path}: damaged at {place.offset} ({problem})") from error
        if tensor.shape != chunk.sizes:
            raise UserError(f"{self.path / place.relative_path}: damaged at {place.offset} (not the block of {key})")
        return tensor

    def _open(self, name: str) -> tuple[io.FileIO, UntypedStorage]:
        if name not in self._files:
            file = io.FileIO(self.path / name)
            size = os.fstat(file.fileno()).st_size
            mapped: Any = UntypedStorage.from_file(str(self.path / name), shared=False, nbytes=size)
            self._files[name] = file, mapped
        return self._files[name]
