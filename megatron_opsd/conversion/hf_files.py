"""Hugging Face checkpoint directories: reading slices of tensors, writing shards with their index."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_opsd.conversion.mapping import Shape
from megatron_opsd.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 2**30


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
        """Compare names and shapes with those the architecture calls for.

        Raises:
            UserError: the first missing, unexpected or misshapen tensor.
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

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start:stop`` along ``dim`` of a tensor (all of it where ``dim`` is None)."""
        tensor = self._open(self._file_of[name]).get_slice(name)
        if dim is None:
            return tensor[:]
        return tensor[(slice(None),) * dim + (slice(start, stop),)]


def write_hf(tensors: Iterable[tuple[str, Tensor]], source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write ``tensors`` as a Hugging Face directory: safetensors shards of at most 5 GiB, index, and the
    configuration, tokenizer and generation files of ``source``. Appears under its name only when complete."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in {".safetensors", ".bin", ".pt", ".pth"} and file.name != INDEX:
            shutil.copyfile(file, staging / file.name)
    _set_dtype(staging / "config.json", dtype)
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
    if len(shards) == 1:
        (staging / "shard-0").rename(staging / SINGLE)
    else:
        weight_map = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (staging / f"shard-{i}").rename(staging / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging / INDEX).write_text(json.dumps(index, indent=2))
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
