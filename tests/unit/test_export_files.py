"""A directory that is written is its source but for the weights. That vLLM loads it is in test_engines.py."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opsd.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_opsd.errors import UserError
from megatron_opsd.weights import hf_files
from megatron_opsd.weights.hf_files import HFReader, write_hf
from megatron_opsd.weights.model_files import copy_model_files
from tests.unit.bad_inputs import Inputs

# What is beside the weights of published models, and what is not to be copied.
KEPT = [
    "LICENSE",
    "additional_chat_templates/tool_use.jinja",
    "assets/figure.png",
    "assets/more/figure.png",
    "merges.txt",
    "vocab.json",
]
LEFT_OUT = [
    ".cache/huggingface/download/config.json.metadata",
    ".git/config",
    ".gitattributes",
    "checkpoint-500/config.json",
    "checkpoint-500/optimizer.pt",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "model-q8.gguf",
    "model.safetensors.index.json",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/deeper/consolidated.00.pth",
    "original/params.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "training_args.bin",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With all the files above; the weights are those of model.safetensors."""
    inputs = Inputs(tmp_path)
    held = load_file(inputs.model / "model.safetensors")
    for name in [*KEPT, *LEFT_OUT]:
        inputs.write(f"model/{name}", "{{ messages }}")
    inputs.write("model/model.safetensors.index.json", json.dumps({"weight_map": dict.fromkeys(held, hf_files.SINGLE)}))
    return inputs.model


@pytest.fixture
def umask() -> Iterator[int]:
    """Of the process: the group may write."""
    before = os.umask(0o002)
    yield 0o002
    os.umask(before)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def export(model: Path, out: Path) -> Path:
    write_hf(load_file(model / "model.safetensors").items(), model, out, torch.float32)
    return out


def convert_and_back(model: Path, out: Path) -> Path:
    hf_to_megatron(model, out.with_name("megatron"), None, verify=False)
    megatron_to_hf(out.with_name("megatron"), out, verify=False)
    return out


@pytest.mark.parametrize("way", [export, convert_and_back])
def test_all_but_the_weights_is_kept(way, model: Path, tmp_path: Path, umask: int) -> None:
    out = way(model, tmp_path / "out")
    assert names(out) == names(model) - set(LEFT_OUT)
    for name in names(out) - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert json.loads((out / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    for path in [out, *out.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_shards_have_the_modes_of_new_files(
    model: Path, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 500_000)
    out = export(model, tmp_path / "out")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in shards} == {0o666 & ~umask}
    reader, wanted = HFReader(out), load_file(model / "model.safetensors")
    reader.check({name: tuple(tensor.shape) for name, tensor in wanted.items()})
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in wanted.items())


def test_transformers_loads_an_export(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out")
    wanted = load_file(model / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(model)
    assert ours.chat_template == theirs.chat_template
    assert set(ours.chat_template) == {"default", "tool_use"}


def test_links_are_followed(model: Path, tmp_path: Path) -> None:
    """The hub's cache has a link for every file."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for entry in model.iterdir():
        (snapshot / entry.name).symlink_to(entry)
    (snapshot / "loop").symlink_to(snapshot)
    copy_model_files(snapshot, tmp_path / "out", torch.float32)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert names(tmp_path / "out") == names(model) - set(LEFT_OUT) - {"model.safetensors"}


def test_what_is_no_file_is_left_out(model: Path, tmp_path: Path) -> None:
    """It must not cost the export at the end of a run."""
    (model / "gone.txt").symlink_to("nowhere")
    os.mkfifo(model / "pipe")
    copy_model_files(model, tmp_path / "out", torch.float32)
    assert "config.json" in names(tmp_path / "out")
    assert not {"gone.txt", "pipe"} & set(names(tmp_path / "out"))


def test_what_cannot_be_copied_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=f"{model}: cannot be copied to {tmp_path}/out .File exists"):
        copy_model_files(model, tmp_path / "out", torch.float32)


def test_a_copy_below_its_source(model: Path) -> None:
    """A run whose folder is in that of its model."""
    out = model / "runs" / "first" / "hf"
    out.parent.mkdir(parents=True)
    copy_model_files(model, out, torch.float32)
    assert "config.json" in names(out)
    assert not (out / "runs").exists()


@pytest.mark.parametrize("keys", [{"dtype": "float32"}, {"torch_dtype": "float32"}, {"dtype": "x", "torch_dtype": "x"}])
def test_the_dtype_is_written_under_the_names_of_the_source(keys: dict[str, str], tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    inputs.config(**{"dtype": ...} | keys)
    copy_model_files(inputs.model, tmp_path / "out", torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in config if "dtype" in key} == dict.fromkeys(keys, "bfloat16")
