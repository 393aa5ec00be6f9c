"""Converts Hugging Face directories to Megatron's distributed checkpoints and back, one tensor in memory at a time.

It runs in one process, or in several under torchrun that share the work and the disk.
"""

import fcntl
import os
import shutil
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
from megatron_opsd.files import parse_toml, read_text
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import checksum
from megatron_opsd.weights.hf_files import (
    DTYPE_NAMES,
    SHARD_BYTES,
    HFReader,
    ShardWriter,
    shard_name,
    write_index,
)
from megatron_opsd.weights.mapping import NameTable, Shape
from megatron_opsd.weights.model_files import copy_model_files

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
    _check_folders(hf, megatron)
    table = NameTable(read_architecture(hf))
    source = HFReader(hf)
    source.check(table.hf_tensors())
    source.check_tied_head(table.arch)
    dtype = dtype or source.dtype()
    blocks = list(whole_model(table, BLOCK_ELEMENTS))
    share = blocks[rank::world_size]
    with _new_directory(megatron, _bytes(blocks, dtype)) as staging:
        with _progress("converting", _bytes(share, dtype)) as advance:

            def read(block: Block) -> Tensor:
                advance(_bytes([block], dtype))
                return block.rule.fuse(_read_as(source, block, dtype)).clone()  # no longer mapped from the file

            write_checkpoint(staging, share, dtype, _ahead(read, share))
        if rank == 0:
            copy_model_files(hf, staging / MODEL_FILES, dtype)
        if verify:
            _settle(staging)
            _verify(source, DistReader(staging), list(whole_model(table))[rank::world_size], dtype)
    if verify and rank == 0:
        _report(table, source.dtypes(), dtype)


def megatron_to_hf(megatron: Path, hf: Path, verify: bool) -> None:
    """Write the model of a distributed checkpoint as a Hugging Face directory.

    megatron: a checkpoint written by :func:`hf_to_megatron` or by a run, with any layout.
    verify: read both back and compare the checksum of every tensor before the result gets its name.

    Raises:
        UserError: the checkpoint is incomplete or not of this model, or ``hf`` exists or cannot be written.
    """
    rank, world_size = _rank_and_world_size()
    _check_folders(megatron, hf)
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
    if verify and rank == 0:
        _report(table, [DTYPE_NAMES[dtype]], dtype)


def _read_as(source: HFReader, block: Block, dtype: torch.dtype) -> list[Tensor]:
    """The rows of a block, cast once.

    Raises:
        UserError: a finite value would become an infinite one.
    """
    parts = [source.read(name, 0, block.start, block.stop) for name in block.rule.hf]
    cast = [part.to(dtype) for part in parts]
    for name, before, after in zip(block.rule.hf, parts, cast, strict=True):
        if torch.finfo(after.dtype).max < torch.finfo(before.dtype).max:
            _check_range(f"{source.path}: {name}", before, after)
    return cast


def _check_range(place: str, before: Tensor, after: Tensor) -> None:
    """Look for finite values that a cast has made infinite.

    Raises:
        UserError: there is one.
    """
    if torch.stack(after.aminmax()).isfinite().all():  # in a sixth of the cast's time
        return
    lost = before[after.isinf() & before.isfinite()]
    if len(lost):
        limit = f"{DTYPE_NAMES[after.dtype]} ends at {torch.finfo(after.dtype).max:.4g}"
        raise UserError(f"{place} holds {lost[0].item():.4g}, and {limit}; choose another --dtype")


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
    """Compare the checksums of ``blocks`` in both directories; ``dtype`` is that of the result.

    Only the source is cast, and once: the result is compared as it is in its files.

    Raises:
        UserError: a tensor differs; names the first one.
    """
    with _progress("verifying ", _bytes(blocks, dtype)) as advance:
        for block in blocks:
            parts = zip(_read_as(hf, block, dtype), block.rule.split(megatron.read(block)), strict=True)
            for name, (ours, theirs) in zip(block.rule.hf, parts, strict=True):
                if ours.dtype != theirs.dtype or checksum(ours) != checksum(theirs):
                    raise UserError(f"{hf.path} and {megatron.path}: the checksums of {name} differ; convert again")
            advance(_bytes([block], dtype))


def _report(table: NameTable, source: Sequence[str], dtype: torch.dtype) -> None:
    name = DTYPE_NAMES[dtype]
    cast = "" if source == [name] else f" from {', '.join(source)}"
    print(f"verified: {len(table.hf_tensors())} tensors, {name}{cast}")


def _check_folders(source: Path, target: Path) -> None:
    """Check the two directories of a conversion before anything is read.

    Raises:
        UserError: ``target`` exists, cannot be named, or one is in the other.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--hf and --megatron: {target} is in {source}; name a directory beside it")
    try:
        exists = target.exists() or target.is_symlink()
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    if exists:
        raise UserError(f"{target}: exists already; remove it or name another directory")


def _model_files(megatron: Path) -> Path:
    """The folder with a checkpoint's configuration and tokenizer: in the checkpoint, or the model that the run used."""
    if (megatron / MODEL_FILES).is_dir():
        return megatron / MODEL_FILES
    run = megatron.resolve().parent.parent / "config.toml"
    where = f"put the model's config.json and tokenizer files into {megatron / MODEL_FILES}"
    if not run.is_file():
        raise UserError(f"{megatron}: holds no {MODEL_FILES} folder and belongs to no run ({run} not found); {where}")
    try:
        path = Path(parse_toml(read_text(run), str(run))["model"]["path"])
    except (KeyError, TypeError):
        raise UserError(f"{run}: holds no model.path; {where}") from None
    if not (path / "config.json").is_file():
        here = "" if path.is_absolute() else f" (looked for in {Path.cwd()}; the run may have begun in another folder)"
        raise UserError(f"{run}: model.path = {str(path)!r} holds no config.json any more{here}; {where}")
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
        UserError: the disk of ``target`` has fewer than ``size`` bytes left or fails.
    """
    rank, _ = _rank_and_world_size()
    staging = target.with_name(f".{target.name}.tmp")
    _barrier()
    lock = _claim(target, staging) if rank == 0 else None
    try:
        if rank == 0:
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
        if lock is not None:
            os.close(lock)


def _claim(target: Path, staging: Path) -> int:
    """Make the folder, without what a conversion that died has left there, and lock it; see :func:`_lock`.

    Raises:
        UserError: it cannot be made, or another conversion writes to it. Nothing of that one is touched.
    """
    try:
        if staging.is_dir():
            os.close(_lock(staging))
            shutil.rmtree(staging)
        staging.mkdir(parents=True)  # of two that start at once, one fails here
        return _lock(staging)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({staging}: {error.strerror})") from error


def _lock(staging: Path) -> int:
    """Keep a folder for this process, until the returned descriptor is closed or the process ends.

    Raises:
        UserError: another conversion that lives writes to it.
    """
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{staging}: another conversion is writing there; wait for its end, or name another directory"
        ) from None
    except OSError:  # a file system without locks
        pass
    return descriptor


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
