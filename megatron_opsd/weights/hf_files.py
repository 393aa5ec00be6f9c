"""Hugging Face checkpoint directories: reading slices of tensors, writing shards with their index."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_opsd.errors import UserError
from megatron_opsd.weights.mapping import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 2**30
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class HFReader:
    """Reads slices of a checkpoint's tensors without reading the rest (single file or sharded)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, safe_open] = {}
        if (self.path / INDEX).is_file():
            self._file_of: dict[str, str] = json.loads((self.path / INDEX).read_text())["weight_map"]
        elif (self.path / SINGLE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise UserError(f"{self.path}: holds neither {INDEX} nor {SINGLE}; model.path needs safetensors weights")

    def _open(self, file: str) -> safe_open:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / file}: not a readable safetensors file ({error})") from error
        return self._files[file]

    def check(self, expected: dict[str, Shape]) -> None:
        """Compare names and shapes with those that the architecture requires.

        Raises:
            UserError: a tensor is missing, unexpected or has the wrong shape; names the first one.
        """
        for name, shape in expected.items():
            if name not in self._file_of:
                raise UserError(f"{self.path}: the tensor {name} is missing; config.json calls for {list(shape)}")
            file = self._file_of[name]
            found = tuple(self._open(file).get_slice(name).get_shape())
            if found != shape:
                raise UserError(
                    f"{self.path / file}: {name} has the shape {list(found)}; config.json calls for {list(shape)}"
                )
        extra = sorted(self._file_of.keys() - expected.keys() - {"lm_head.weight"})
        if extra:
            raise UserError(f"{self.path}: {len(extra)} tensors the architecture does not have, first {extra[0]}")

    def dtype(self) -> torch.dtype:
        """The dtype of all tensors.

        Raises:
            UserError: the tensors have several dtypes, or one that is not supported.
        """
        names = sorted({self._open(file).get_slice(name).get_dtype() for name, file in self._file_of.items()})
        known = [dtype for dtype, name in _NAMES.items() if [name] == names]
        if not known:
            raise UserError(f"{self.path}: its tensors are {', '.join(names)}; choose one of them with --dtype")
        return known[0]

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start:stop`` along ``dim`` of a tensor (all of it where ``dim`` is None)."""
        tensor = self._open(self._file_of[name]).get_slice(name)
        if dim is None:
            return tensor[:]
        return tensor[(slice(None),) * dim + (slice(start, stop),)]


def shard_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(path: Path, shards: Sequence[Iterable[str]], total_size: int) -> None:
    """Write which shard holds which tensor, if there is more than one shard."""
    if len(shards) > 1:
        files = {name: shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": files}
        (path / INDEX).write_text(json.dumps(index, indent=2))


def copy_model_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy configuration, tokenizer and generation files: everything but weights and their index."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in {".safetensors", ".bin", ".pt", ".pth"} and file.name != INDEX:
            shutil.copyfile(file, target / file.name)
    _set_dtype(target / "config.json", dtype)


class ShardWriter:
    """Writes a safetensors file. Its tensors come in order and in parts, so no whole tensor has to be in memory."""

    def __init__(self, file: Path, tensors: dict[str, Shape], dtype: torch.dtype) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format requires aligned tensors
        self._file = file.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._size = 8 + len(text) + end

    def write(self, tensor: Tensor) -> None:
        """Append rows of the current tensor, or the first rows of the next one."""
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Returns when the file is on the disk."""
        assert self._file.tell() == self._size
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_hf(tensors: Iterable[tuple[str, Tensor]], source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write ``tensors`` as a Hugging Face directory: safetensors shards of at most 5 GiB, index, and the
    configuration, tokenizer and generation files of ``source``. The directory gets its name when it is complete."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    copy_model_files(source, staging, dtype)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, staging / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    for i in range(len(shards)):
        (staging / f"shard-{i}").rename(staging / shard_name(i, len(shards)))
    write_index(staging, shards, total)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
