"""What becomes of a checkpoint's values: casts, ranges, a tied model's head."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_opsd.convert import blocks, convert
from megatron_opsd.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_opsd.convert.dist_files import DistReader
from megatron_opsd.errors import UserError
from megatron_opsd.weights import hf_files
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.mapping import NameTable
from tests.distributed.tiny import write_model
from tests.unit.test_convert import assert_same, fails, read_all


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "qwen3", tied=True)


def test_verification_says_what_it_compared(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, megatron = read_all(model), tmp_path / "megatron"
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, model / "model.safetensors")
    hf_to_megatron(model, megatron, torch.bfloat16, verify=True)
    megatron_to_hf(megatron, tmp_path / "back", verify=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verified")]
    assert said == [f"verified: {len(tensors)} tensors, BF16{cast}" for cast in (" from F16, F32", "")]
    assert_same(tmp_path / "back", {name: x.to(torch.bfloat16) for name, x in tensors.items()})


def test_verification_sees_another_dtype(model: Path, tmp_path: Path) -> None:
    """The result's values are compared as they are in its files, and not after a cast."""
    megatron = tmp_path / "megatron"
    hf_to_megatron(model, megatron, None, verify=False)
    blocks_of = list(blocks.whole_model(NameTable(read_architecture(model))))
    with pytest.raises(UserError, match=r"the checksums of \S+ differ"):
        convert._verify(HFReader(model), DistReader(megatron), blocks_of, torch.bfloat16)
    convert._verify(HFReader(model), DistReader(megatron), blocks_of, torch.float32)


@pytest.mark.parametrize("flags", [[], ["--verify"]])
@pytest.mark.parametrize(
    ("source", "value", "dtype", "message"),
    [
        (torch.float32, -1e5, "fp16", "holds -1e+05, and F16 ends at 6.55e+04"),
        (torch.bfloat16, 65_536.0, "fp16", "holds 6.554e+04, and F16 ends at 6.55e+04"),
        (torch.float32, 3.4e38, "bf16", "holds 3.4e+38, and BF16 ends at 3.39e+38"),
    ],
)
def test_values_that_a_dtype_cannot_hold(
    source: torch.dtype,
    value: float,
    dtype: str,
    message: str,
    flags: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = {name: x.to(source) for name, x in read_all(model).items()}
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors")
    line = fails(capsys, "hf-to-megatron", model, tmp_path / "out", "--dtype", dtype, *flags)
    assert f"model.layers.2.mlp.down_proj.weight {message}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_infinite_values_stay(model: Path, tmp_path: Path) -> None:
    """They are the file's own, and none comes from a cast."""
    tensors = read_all(model)
    tensors["model.norm.weight"][:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    save_file(tensors, model / "model.safetensors")
    hf_to_megatron(model, tmp_path / "megatron", torch.float16, verify=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=True)
    assert_same(tmp_path / "back", {name: x.half() for name, x in tensors.items()})


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_model_with_a_head_in_its_files(tied: bool, model: Path, tmp_path: Path) -> None:
    """The same values are one tensor, and others are a model that is not tied."""
    tensors = read_all(model)
    head = tensors["model.embed_tokens.weight"] + (0 if tied else 1)
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors")
    table = NameTable(read_architecture(model))
    if not tied:
        HFReader(model).check(table.hf_tensors())
        with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens"):
            HFReader(model).check_tied_head(table.arch)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        tensors["lm_head.weight"] = head
    hf_to_megatron(model, tmp_path / "megatron", None, verify=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=True)
    assert_same(tmp_path / "back", tensors)


def test_the_last_row_of_a_head_is_compared(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_files, "_ELEMENTS_AT_ONCE", 64 * 7)
    tensors = read_all(model)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        HFReader(model).check_tied_head(read_architecture(model))


def test_checkpoints_of_other_dtypes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_to_megatron(model, tmp_path / "megatron", torch.float64, verify=False)
    line = fails(capsys, "megatron-to-hf", tmp_path / "out", tmp_path / "megatron")
    assert "its tensors are torch.float64; only F32, BF16, F16 are weights" in line
