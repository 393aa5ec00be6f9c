"""Hugging Face directories to Megatron's checkpoints and back. That Megatron loads them is in test_layouts.py."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opsd.cli import main
from megatron_opsd.convert import blocks, convert
from megatron_opsd.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_opsd.weights import hf_files
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.mapping import NameTable
from tests.distributed.tiny import write_model

ROOT = Path(__file__).parents[2]
MODELS = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False), ("qwen3_moe", False)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BENCHMARK = ROOT / "benchmarks" / "bench_convert.py"


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(path.glob("*.safetensors")) for name, x in load_file(file).items()}


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    save_file({name: x.to(dtype) for name, x in read_all(path).items()}, path / "model.safetensors")


def assert_same(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = read_all(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def fails(capsys: pytest.CaptureFixture[str], direction: str, hf: Path, megatron: Path, *flags: str) -> str:
    """The one line of a conversion that is refused."""
    with pytest.raises(SystemExit, match="2"):
        main(["convert", direction, "--hf", str(hf), "--megatron", str(megatron), *flags])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face directory with a tokenizer file."""
    path = write_model(tmp_path / "model", "qwen3", tied=True)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def megatron(model: Path, tmp_path: Path) -> Path:
    hf_to_megatron(model, tmp_path / "megatron", None, verify=False)
    return tmp_path / "megatron"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_there_and_back_bit_for_bit(
    family: str, tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bf16":
        monkeypatch.setattr(convert, "BLOCK_ELEMENTS", 1000)  # tensors of many blocks
    path = write_model(tmp_path / "model", family, tied)
    set_dtype(path, DTYPES[dtype])
    hf_to_megatron(path, tmp_path / "megatron", None, verify=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=True)
    assert_same(tmp_path / "back", read_all(path))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_switch(model: Path, tmp_path: Path, dtype: str) -> None:
    flags = ["--hf", str(model), "--megatron", str(tmp_path / "megatron"), "--dtype", dtype, "--verify"]
    main(["convert", "hf-to-megatron", *flags])
    main(["convert", "megatron-to-hf", "--hf", str(tmp_path / "back"), "--megatron", str(tmp_path / "megatron")])
    assert_same(tmp_path / "back", {name: x.to(DTYPES[dtype]) for name, x in read_all(model).items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")


def test_checkpoint_of_a_run(
    model: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no configuration of its own: the run's config.toml says which model it was."""
    step, toml = tmp_path / "run" / "checkpoints" / "step_000001", tmp_path / "run" / "config.toml"
    shutil.copytree(megatron, step)
    shutil.rmtree(step / "hf")
    for text, message in (
        ("[model", f"{toml}: not valid TOML"),
        ("a = " + "[" * 9000, f"{toml}: not valid TOML (nested too deeply)"),
        ("", f"{toml}: holds no model.path; put the model's config.json"),
        ("model = 1", f"{toml}: holds no model.path"),
        ("[model]\npath = 1", f"{toml}: holds no model.path"),
        ('[model]\npath = "/none"', f"{toml}: model.path = '/none' holds no config.json any more; put"),
        ('[model]\npath = "none"', f"model.path = 'none' holds no config.json any more (looked for in {Path.cwd()}"),
    ):
        toml.write_text(text)
        assert message in fails(capsys, "megatron-to-hf", tmp_path / "back", step)
    toml.write_bytes(b'[model]\npath = "\xe9"')
    assert f"{toml}: is not UTF-8" in fails(capsys, "megatron-to-hf", tmp_path / "back", step)
    toml.write_text('[model]\npath = "model"')
    monkeypatch.chdir(tmp_path)
    megatron_to_hf(step, Path("new", "parents", "back"), verify=True)
    assert_same(tmp_path / "new" / "parents" / "back", read_all(model))


def test_shards_and_other_files(model: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded directories are written and read; the checkpoint needs nothing else to become one."""
    wanted = read_all(model)
    shutil.rmtree(model)
    monkeypatch.setattr(convert, "SHARD_BYTES", 100_000)
    megatron_to_hf(megatron, tmp_path / "back", verify=True)
    files = sorted(file.name for file in (tmp_path / "back").iterdir())
    assert {"config.json", "generation_config.json", "tokenizer.json", hf_files.INDEX} < set(files)
    shards = [file for file in files if file.endswith(".safetensors")]
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same(tmp_path / "back", wanted)
    hf_to_megatron(tmp_path / "back", tmp_path / "again", None, verify=True)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def flip_last_byte_of_a_tensor(file: Path) -> None:
    """Of the last archive's data: behind it is a directory of the archive's parts."""
    data = bytearray(file.read_bytes())
    data[len(data) - 3000] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_verification_sees_a_flipped_byte(
    direction: str,
    model: Path,
    megatron: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Damaged between writing and reading back; the result never gets its name."""
    original = convert._settle
    out = tmp_path / "out"

    def damage(directory: Path) -> None:
        original(directory)
        file = next(iter(directory.glob("*.distcp")), directory / "model.safetensors")
        flip_last_byte_of_a_tensor(file)

    monkeypatch.setattr(convert, "_settle", damage)
    folders = (model, out) if direction == "hf-to-megatron" else (out, megatron)
    line = fails(capsys, direction, *folders, "--verify")
    assert re.search(r"the checksums of model\.layers\.3\.\S+ differ", line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "model"]


def test_refused_hugging_face_directories(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, weights, config = tmp_path / "out", model / "model.safetensors", (model / "config.json").read_text()
    tensors = read_all(model)

    def line() -> str:
        return fails(capsys, "hf-to-megatron", model, out)

    (model / "config.json").write_text(config.replace('"qwen3"', '"llama"'))
    assert "model_type = 'llama' is not supported" in line()
    (model / "config.json").write_text(config)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, weights)
    assert "the tensor model.norm.weight is missing; config.json calls for [64]" in line()
    save_file(tensors | {"model.norm.weight": norm, "extra": norm.clone()}, weights)
    assert "1 tensors the architecture does not have, first extra" in line()
    save_file(tensors | {"model.norm.weight": norm[:32].clone()}, weights)
    assert "model.norm.weight has the shape [32]; config.json calls for [64]" in line()
    save_file(tensors | {"model.norm.weight": norm.half()}, weights)
    assert "its tensors are F16, F32; choose one" in line()
    save_file(tensors | {"model.norm.weight": norm}, weights)
    os.truncate(weights, weights.stat().st_size - 1000)
    assert f"{weights}: not a readable safetensors file" in line()
    weights.unlink()
    assert "holds neither model.safetensors.index.json nor model.safetensors" in line()
    assert "no such directory" in fails(capsys, "hf-to-megatron", tmp_path / "none", out)
    assert not out.exists()


def test_refused_checkpoints(model: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, config, weights = tmp_path / "out", megatron / "hf" / "config.json", megatron / "__0_0.distcp"

    def line() -> str:
        return fails(capsys, "megatron-to-hf", out, megatron)

    assert "exists already" in fails(capsys, "megatron-to-hf", model, megatron)
    assert "exists already" in fails(capsys, "hf-to-megatron", model, megatron)
    right = json.loads(config.read_text())
    config.write_text(json.dumps(right | {"hidden_size": 128}))
    assert "has the shape [500, 64]; config.json calls for [500, 128]" in line()
    config.write_text(json.dumps(right | {"model_type": "qwen2", "head_dim": None, "architectures": None}))
    assert "linear_qkv.bias is missing; config.json calls for" in line()
    config.write_text(json.dumps(right))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1000])
    assert f"{weights}: truncated; it has {len(data) - 1000} bytes and should have {len(data)}" in line()
    weights.write_bytes(data[:-1000] + bytes(1000))
    assert f"{weights}: damaged at" in line()
    weights.unlink()
    assert f"{weights}: not found" in line()
    shutil.rmtree(megatron / "hf")
    assert "holds no hf folder and belongs to no run" in line()
    (megatron / ".metadata").write_bytes((megatron / ".metadata").read_bytes()[:1000])
    assert "not a complete distributed checkpoint" in line()
    (megatron / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert fails(capsys, "megatron-to-hf", out, tmp_path / "none").count("not a complete distributed checkpoint") == 1
    assert not out.exists()


def test_two_conversions_into_one_directory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused, and the first is not disturbed."""
    out, original = tmp_path / "out", convert.write_checkpoint
    refused: list[str] = []

    def meanwhile(*arguments: Any) -> None:
        refused.append(fails(capsys, "hf-to-megatron", model, out))
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_checkpoint", meanwhile)
        hf_to_megatron(model, out, None, verify=True)
    assert "another conversion is writing there" in refused[0]
    megatron_to_hf(out, tmp_path / "back", verify=True)


def test_an_unknown_option_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "megatron-to-hf", tmp_path, tmp_path, "--verfy")
    assert line == "opsd: --verfy: unknown option; the nearest valid one is --verify"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space(
    model: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noticed before the start where it can be, and otherwise when it happens; nothing is left behind."""
    before = sorted(tmp_path.iterdir())
    for direction in ("hf-to-megatron", "megatron-to-hf"):
        source, out = (model, megatron) if direction == "hf-to-megatron" else (megatron, model)
        folders = {source.name: source, out.name: tmp_path / "out"}
        with largest_file(200_000):
            assert "out: cannot be written (File too large)" in fails(
                capsys, direction, folders["model"], folders["megatron"]
            )
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
            assert "out: needs 0.0 GB, and its disk has 0.0 GB left" in fails(
                capsys, direction, folders["model"], folders["megatron"]
            )
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """About 460 MB in three files."""
    sys.path.insert(0, str(BENCHMARK.parent))
    from bench_convert import write_model as write_large_model  # pyright: ignore[reportMissingImports]

    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 65_000}
    path = tmp_path_factory.mktemp("large") / "model"
    assert 440e6 < write_large_model(path, 170_000_000, **sizes) < 480e6
    yield path
    shutil.rmtree(path.parent)


def test_memory_stays_within_a_tensor(large_model: Path) -> None:
    """Not the model, and not a file of it.

    On the way to Megatron the block in work, the next, and the last of every key, which torch's writer keeps; on the
    way back the tensor in work, the next, and the block that is being read.
    """
    folder = large_model.parent

    def peak(*arguments: object) -> float:
        command = [sys.executable, str(BENCHMARK), "--one", *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])["peak"]

    block, embedding = 2 * convert.BLOCK_ELEMENTS, 2 * 65_000 * 1024
    slack = 64e6  # what tables need, and what the allocator keeps
    assert peak("hf-to-megatron", large_model, folder / "same") < 10 * block + slack
    assert peak("megatron-to-hf", folder / "same", folder / "back") < embedding + 3 * block + slack
    changed = peak("hf-to-megatron", large_model, folder / "float32", "--dtype", "float32")
    assert changed < 10 * (2 * block) + slack
    assert_same(folder / "back", read_all(large_model))


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_killed_and_started_again(direction: str, large_model: Path, tmp_path: Path) -> None:
    """What a kill leaves never has the result's name, and is gone after the next start."""
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    if direction == "megatron-to-hf":
        hf_to_megatron(large_model, megatron, None, verify=False)
        flags = ["--megatron", str(megatron), "--hf", str(out)]
    else:
        flags = ["--megatron", str(out), "--hf", str(large_model)]
    script = ROOT / "tools" / f"convert_{direction.replace('-', '_')}.py"
    command = [sys.executable, str(script), *flags]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    staging = tmp_path / ".out.tmp"
    while sum(path.stat().st_size for path in staging.glob("*")) < 50e6:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert staging.exists()
    assert not out.exists()
    main(["convert", direction, *flags, "--verify"])
    assert not staging.exists()
    if direction == "megatron-to-hf":
        assert_same(out, read_all(large_model))


def test_blocks_cover_every_tensor_once(tmp_path: Path) -> None:
    table = NameTable(read_architecture(write_model(tmp_path, "qwen3_moe", tied=True)))
    rows: dict[str, int] = {}
    for block in blocks.whole_model(table):
        for name, shape in block.rule.hf.items():
            assert block.start == rows.get(name, 0)
            rows[name] = shape[0] if block.stop is None else block.stop
    assert rows == {name: shape[0] for name, shape in table.hf_tensors().items()}
