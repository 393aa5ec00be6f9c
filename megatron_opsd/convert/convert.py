"""Converts Hugging Face directories to Megatron's distributed checkpoints and back, one tensor in memory at a time.

It runs in one process, or in several under torchrun that share the work and the disk.
"""

import os
import shutil
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megatron_opsd.convert.blocks import Block, whole_model
from megatron_opsd.convert.dist_files import DistReader, write_checkpoint
from megatron_opsd.errors import UserError
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import checksum
from megatron_opsd.weights.hf_files import (
    SHARD_BYTES,
    HFReader,
    ShardWriter,
    copy_model_files,
    shard_name,
    write_index,
)
from megatron_opsd.weights.mapping import NameTable, Shape

BLOCK_ELEMENTS = 2**23  # 16 MiB in bfloat16: the unit of writing; a rank that needs a part of a block must read it all
MODEL_FILES = "hf"  # where a converted checkpoint keeps the configuration and the tokenizer


def hf_to_megatron(hf: Path, megatron: Path, dtype: torch.dtype | None, verify: bool) -> None:
    """Write the model of ``hf`` as a distributed checkpoint that any layout can load.

    dtype: of the result; None keeps that of the files.
    verify: read both back and compare the checksum of every tensor before the result gets its name.

    Raises:
        UserError: the model is not supported or incomplete, or ``megatron`` exists or cannot be written.
    """
    rank, world_size = _rank_and_world_size()
    table = NameTable(read_architecture(hf))
    source = HFReader(hf)
    source.check(table.hf_tensors())
    dtype = dtype or source.dtype()
    blocks = list(whole_model(table, BLOCK_ELEMENTS))
    share = blocks[rank::world_size]
    with _new_directory(megatron, _bytes(blocks, dtype)) as staging:
        with _progress("converting", _bytes(share, dtype)) as advance:

            def read(block: Block) -> Tensor:
                advance(_bytes([block], dtype))
                return block.rule.fuse(_read_hf(source, block, dtype)).clone()  # no longer mapped from the file

            write_checkpoint(staging, share, dtype, _ahead(read, share))
        if rank == 0:
            copy_model_files(hf, staging / MODEL_FILES, dtype)
        if verify:
            _settle(staging)
            _verify(source, DistReader(staging), list(whole_model(table))[rank::world_size], dtype)


def megatron_to_hf(megatron: Path, hf: Path, verify: bool) -> None:
    """Write the model of a distributed checkpoint as a Hugging Face directory.

    megatron: a checkpoint written by :func:`hf_to_megatron` or by a run, with any layout.
    verify: read both back and compare the checksum of every tensor before the result gets its name.

    Raises:
        UserError: the checkpoint is incomplete or not of this model, or ``hf`` exists or cannot be written.
    """
    rank, world_size = _rank_and_world_size()
    source = DistReader(megatron)
    files = _model_files(megatron)
    table = NameTable(read_architecture(files))
    blocks = list(whole_model(table))
    source.check(blocks)
    dtype = source.dtype(blocks)
    shards = _split_into_shards(blocks, dtype)
    share = shards[rank::world_size]
    with _new_directory(hf, _bytes(blocks, dtype)) as staging:
        with _progress("converting", sum(_bytes(shard, dtype) for shard in share)) as advance:
            for i, shard in zip(range(rank, len(shards), world_size), share, strict=True):
                writer = ShardWriter(staging / shard_name(i, len(shards)), _tensors(shard), dtype)
                for block, tensor in zip(shard, _ahead(source.read, shard), strict=True):
                    for part in block.rule.split(tensor):
                        writer.write(part)
                    advance(_bytes([block], dtype))
                writer.close()
        if rank == 0:
            write_index(staging, [_tensors(shard) for shard in shards], _bytes(blocks, dtype))
            copy_model_files(files, staging, dtype)
        if verify:
            _settle(staging)
            _verify(HFReader(staging), source, [block for shard in share for block in shard], dtype)


def _read_hf(source: HFReader, block: Block, dtype: torch.dtype) -> list[Tensor]:
    return [source.read(name, 0, block.start, block.stop).to(dtype) for name in block.rule.hf]


def _ahead(read: Callable[[Block], Tensor], blocks: Iterable[Block]) -> Iterator[Tensor]:
    """Yield ``read(block)`` for each block; a thread reads the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[Tensor]] = deque()
        for block in blocks:
            coming.append(thread.submit(read, block))
            if len(coming) > 1:
                yield coming.popleft().result()
        yield coming.popleft().result()


def _verify(hf: HFReader, megatron: DistReader, blocks: Sequence[Block], dtype: torch.dtype) -> None:
    """Compare the checksums of ``blocks`` in both directories.

    Raises:
        UserError: a tensor differs; names the first one.
    """
    with _progress("verifying ", _bytes(blocks, dtype)) as advance:
        for block in blocks:
            parts = zip(_read_hf(hf, block, dtype), block.rule.split(megatron.read(block)), strict=True)
            for name, (ours, theirs) in zip(block.rule.hf, parts, strict=True):
                if checksum(ours) != checksum(theirs):
                    raise UserError(f"{hf.path} and {megatron.path}: the checksums of {name} differ; convert again")
            advance(_bytes([block], dtype))


def _model_files(megatron: Path) -> Path:
    """The folder with a checkpoint's configuration and tokenizer: in the checkpoint, or the model that the run used."""
    if (megatron / MODEL_FILES).is_dir():
        return megatron / MODEL_FILES
    run = megatron.resolve().parents[1] / "config.toml"
    where = f"put the model's config.json and tokenizer files into {megatron / MODEL_FILES}"
    if not run.is_file():
        raise UserError(f"{megatron}: holds no {MODEL_FILES} folder and belongs to no run ({run} not found); {where}")
    path = Path(tomllib.loads(run.read_text())["model"]["path"])
    if not (path / "config.json").is_file():
        raise UserError(f"{run}: model.path = {str(path)!r} holds no config.json any more; {where}")
    return path


def _tensors(blocks: Iterable[Block]) -> dict[str, Shape]:
    return {name: shape for block in blocks for name, shape in block.rule.hf.items()}


def _bytes(blocks: Iterable[Block], dtype: torch.dtype) -> int:
    return sum(block.numel for block in blocks) * dtype.itemsize


def _split_into_shards(blocks: Iterable[Block], dtype: torch.dtype) -> list[list[Block]]:
    """The blocks of each safetensors file. No tensor is in two files."""
    shards: list[list[Block]] = [[]]
    size = 0
    for _, group in groupby(blocks, key=lambda block: tuple(block.rule.hf)):
        tensor = list(group)
        if shards[-1] and size + _bytes(tensor, dtype) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1] += tensor
        size += _bytes(tensor, dtype)
    return shards


@contextmanager
def _new_directory(target: Path, size: int) -> Iterator[Path]:
    """A directory beside ``target`` that is renamed to it at the end of the block, when all of it is on the disk.

    The leftovers of an earlier attempt are removed first.

    Raises:
        UserError: ``target`` exists, or its disk has fewer than ``size`` bytes left or fails.
    """
    rank, _ = _rank_and_world_size()
    staging = target.with_name(f".{target.name}.tmp")
    if target.exists():
        raise UserError(f"{target}: exists already; remove it or name another directory")
    _barrier()
    try:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            free = shutil.disk_usage(staging).free
            if free < size:
                raise UserError(f"{target}: needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left")
        _barrier()
        yield staging
        _settle(staging)
        if rank == 0:
            staging.rename(target)
            _sync(target.parent)
        _barrier()
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _settle(directory: Path) -> None:
    """Write all ranks' files to the disk and drop them from the page cache, so that the next read is from the disk."""
    _barrier()
    if _rank_and_world_size()[0] == 0:
        for path in [*directory.rglob("*"), directory]:
            _sync(path)
    _barrier()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes, speed and time left on the terminal of rank 0, for its share of the work."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=_rank_and_world_size()[0] > 0) as progress:
        task = progress.add_task(title, total=total)
        yield lambda size: progress.advance(task, size)


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
