"""Hugging Face checkpoint directories: reading slices of tensors, writing shards with their index."""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_opsd.errors import UserError
from megatron_opsd.files import LFS_POINTER, excerpt, read_json
from megatron_opsd.weights.architecture import Architecture
from megatron_opsd.weights.mapping import Shape
from megatron_opsd.weights.model_files import copy_model_files, is_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 2**30
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ELEMENTS_AT_ONCE = 2**22  # of two tensors that are compared


class _Index(BaseModel):
    model_config = ConfigDict(strict=True)

    weight_map: Annotated[dict[str, str], Field(min_length=1)]

    @field_validator("weight_map")
    @classmethod
    def _plain_names(cls, weight_map: dict[str, str]) -> dict[str, str]:
        for tensor, file in weight_map.items():
            if not file.endswith(".safetensors") or set(file) & set("/\\\0"):
                raise ValueError(f"weight_map.{tensor} = {excerpt(file)}: must be a .safetensors file in this folder")
        return weight_map


class HFReader:
    """Reads slices of a checkpoint's tensors without reading the rest (single file or sharded).

    Raises:
        UserError: there are no weights, the index is broken or names files that are not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[tuple[str, str], safe_open] = {}
        if (self.path / INDEX).exists():
            self._file_of = read_json(self.path / INDEX, _Index, "download it again").weight_map
            self._check_files(sorted(set(self._file_of.values())))
        elif (self.path / SINGLE).exists():
            self._file_of = dict.fromkeys(self._open(SINGLE, "np").keys(), SINGLE)
        else:
            raise UserError(f"{self.path}: holds neither {INDEX} nor {SINGLE}{self._other_weights()}")

    def _check_files(self, files: list[str]) -> None:
        missing = [file for file in files if not (self.path / file).exists()]
        if missing:
            raise UserError(
                f"{self.path / missing[0]}: no such file; {len(missing)} of the {len(files)} files that {INDEX} names "
                "are missing; download them again"
            )
        if SINGLE not in files and (self.path / SINGLE).exists():  # which transformers would read instead
            raise UserError(
                f"{self.path}: holds {SINGLE} and another model in the files that {INDEX} names; remove one of them"
            )

    def _other_weights(self) -> str:
        others = sorted(file.name for file in self.path.iterdir() if is_weights(file))
        if not others:
            return "; model.path needs safetensors weights"
        if others[0].endswith(".safetensors"):
            return f", but {others[0]}; model.path needs a whole model's weights with their index"
        return f", but {others[0]}; let transformers load the model and save it with save_pretrained as safetensors"

    def _open(self, file: str, framework: str = "pt") -> safe_open:
        """A file to read from. With numpy's framework only its header: torch's maps all of it as if it would write."""
        if (file, framework) not in self._files:
            path = self.path / file
            try:
                self._files[file, framework] = safe_open(path, framework=framework)
            except (SafetensorError, OSError, RuntimeError) as error:
                if path.is_dir():
                    raise UserError(f"{path}: is a folder, and a safetensors file is needed") from None
                if isinstance(error, SafetensorError) and _is_lfs_pointer(path):
                    raise UserError(f"{path}: is a git-lfs pointer to the weights; run `git lfs pull`") from None
                raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from error
        return self._files[file, framework]

    def check(self, expected: dict[str, Shape]) -> None:
        """Compare names, shapes and dtypes with those that the architecture requires.

        It reads each file's header once and no weights: a second for 100 000 tensors.

        Raises:
            UserError: a file is cut, or a tensor is missing, unexpected, of the wrong shape or not of a dtype of
                weights; names the first one.
        """
        self._check_index()
        for name, shape in expected.items():
            if name not in self._file_of:
                remedy = (
                    "if the model has none, set tie_word_embeddings = true" if name == HEAD else "download it again"
                )
                raise UserError(
                    f"{self.path}: the tensor {name} is missing; config.json calls for {list(shape)}; {remedy}"
                )
            self._check_tensor(name, shape)
        extra = sorted(self._file_of.keys() - expected.keys() - {HEAD})
        if extra:
            raise UserError(
                f"{self.path}: {len(extra)} tensors the architecture does not have, first {extra[0]}; config.json is "
                "of another model"
            )
        if HEAD in self._file_of and HEAD not in expected:  # of a tied model: see check_tied_head
            self._check_tensor(HEAD, expected[EMBEDDING])

    def _check_index(self) -> None:
        """The index and the files say the same: other programs read all that is in the files."""
        listed: dict[str, set[str]] = defaultdict(set)
        for name, file in self._file_of.items():
            listed[file].add(name)
        for file, names in sorted(listed.items()):
            held = set(self._open(file, "np").keys())
            if ghosts := sorted(names - held):
                raise UserError(
                    f"{self.path / INDEX}: says that {ghosts[0]} is in {file}, which has no such tensor; download both"
                )
            if unlisted := sorted(held - names):
                raise UserError(
                    f"{self.path / file}: holds {unlisted[0]}, which {INDEX} does not place there; download both"
                )

    def _check_tensor(self, name: str, shape: Shape) -> None:
        file, tensor = self.path / self._file_of[name], self._slice(name, "np")
        found, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if dtype not in DTYPE_NAMES.values():
            raise UserError(
                f"{file}: {name} has the dtype {dtype}; only {', '.join(DTYPE_NAMES.values())} are weights: choose the "
                "model that is not quantised"
            )
        if found != shape:
            raise UserError(f"{file}: {name} has the shape {list(found)}; config.json calls for {list(shape)}")

    def check_tied_head(self, arch: Architecture) -> None:
        """Where a tied model's files have a head, compare it with the embedding, some rows at a time.

        Other programs take such a head, and we would drop it. Call it after :meth:`check`: it reads both tensors.

        Raises:
            UserError: they differ.
        """
        if not arch.share_embeddings_and_output_weights or HEAD not in self._file_of:
            return
        head, embedding = self._slice(HEAD), self._slice(EMBEDDING)
        step = max(1, _ELEMENTS_AT_ONCE // arch.hidden_size)
        for start in range(0, arch.vocab_size, step):
            ours, theirs = (tensor[start : start + step].view(torch.uint8) for tensor in (embedding, head))
            if not torch.equal(ours, theirs):
                raise UserError(
                    f"{self.path / self._file_of[HEAD]}: {HEAD} differs from {EMBEDDING}, and config.json ties them; "
                    "set tie_word_embeddings = false in it"
                )

    def dtypes(self) -> list[str]:
        """The names of the tensors' dtypes."""
        return sorted({self._slice(name, "np").get_dtype() for name in self._file_of})

    def dtype(self) -> torch.dtype:
        """The dtype of all tensors.

        Raises:
            UserError: the tensors have several dtypes.
        """
        names = self.dtypes()
        known = [dtype for dtype, name in DTYPE_NAMES.items() if [name] == names]
        if not known:
            raise UserError(f"{self.path}: its tensors are {', '.join(names)}; choose one of them with --dtype")
        return known[0]

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start:stop`` along ``dim`` of a tensor (all of it where ``dim`` is None)."""
        tensor = self._slice(name)
        if dim is None:
            return tensor[:]
        return tensor[(slice(None),) * dim + (slice(start, stop),)]

    def _slice(self, name: str, framework: str = "pt") -> Any:
        return self._open(self._file_of[name], framework).get_slice(name)


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def shard_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(path: Path, shards: Sequence[Iterable[str]], total_size: int) -> None:
    """Write which shard holds which tensor, if there is more than one shard."""
    if len(shards) > 1:
        files = {name: shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": files}
        (path / INDEX).write_text(json.dumps(index, indent=2))


class ShardWriter:
    """Writes a safetensors file. Its tensors come in order and in parts, so no whole tensor has to be in memory."""

    def __init__(self, file: Path, tensors: dict[str, Shape], dtype: torch.dtype) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
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
    """Write ``tensors`` as a Hugging Face directory: safetensors shards of at most 5 GiB in ``dtype``, index, and what
    ``source`` has beside its weights. The directory gets its name when it is complete."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    copy_model_files(source, staging, dtype)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in pending.items()}
        writer = ShardWriter(staging / f"shard-{len(shards)}", shapes, dtype)
        for tensor in pending.values():
            writer.write(tensor)
        writer.close()
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.to("cpu", dtype)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    for i in range(len(shards)):
        (staging / f"shard-{i}").rename(staging / shard_name(i, len(shards)))
    write_index(staging, shards, total)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
