"""A checkpoint whose pickles would run something is refused, and nothing runs."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_opsd.errors import UserError
from megatron_opsd.reliability import pickles


class Harm:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def write_checkpoint(path: Path, common: object, extra_state: object) -> Metadata:
    """A checkpoint without tensors, with one extra state as Transformer Engine's layers have them."""
    torch.save(common, path / "common.pt")
    torch.save(extra_state, path / "__0_0.distcp")
    length = (path / "__0_0.distcp").stat().st_size
    places = {MetadataIndex("extra"): _StorageInfo("__0_0.distcp", 0, length)}
    metadata = Metadata({"extra": BytesStorageMetadata()}, storage_data=places)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def test_a_harmless_checkpoint_passes(tmp_path: Path) -> None:
    metadata = write_checkpoint(tmp_path, {"step": 3, "state": torch.ones(2)}, [None])
    pickles.refuse_foreign(tmp_path)
    assert pickles.read_metadata(tmp_path) == metadata


@pytest.mark.parametrize("part", [".metadata", "common.pt", "__0_0.distcp"])
def test_harm_is_refused_and_named(part: str, tmp_path: Path) -> None:
    harm = Harm(tmp_path / "harm")
    metadata = write_checkpoint(
        tmp_path, {"a": harm} if part == "common.pt" else {}, harm if part == "__0_0.distcp" else [None]
    )
    if part == ".metadata":
        metadata.planner_data = harm
        (tmp_path / part).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=f"{tmp_path}.*{part}|{part}.*mkdir"):
        pickles.refuse_foreign(tmp_path)
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(harm))  # it would have
    assert (tmp_path / "harm").exists()


def test_something_else_is_no_metadata(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match="holds list, not what describes a checkpoint"):
        pickles.refuse_foreign(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80")
    with pytest.raises(UserError, match="not a complete distributed checkpoint"):
        pickles.refuse_foreign(tmp_path)
