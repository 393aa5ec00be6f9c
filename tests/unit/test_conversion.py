import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opsd.errors import UserError
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import checksum
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.mapping import NameTable
from megatron_opsd.weights.tables import FAMILIES
from tests.distributed.tiny import write_model

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 10), (12,), (8, 1)])
def test_checksum_is_the_sum_of_the_shards(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for dim in range(len(shape)):
        half = shape[dim] // 2
        parts = [(tensor.narrow(dim, 0, half), 0), (tensor.narrow(dim, half, shape[dim] - half), half)]
        assert sum(checksum(part, dim, offset) for part, offset in parts) == checksum(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_sees_one_changed_bit_and_any_exchange(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed = tensor.clone()
    changed[5, 9] = torch.nextafter(changed[5, 9].float(), torch.tensor(9.0)).to(dtype) if dtype != DTYPES[1] else 0.5
    assert checksum(changed) != checksum(tensor)
    for order in (torch.tensor([1, 0, 2, 3, 4, 5]), torch.tensor([3, 4, 5, 0, 1, 2])):
        assert checksum(tensor[order]) != checksum(tensor)
    assert checksum(tensor.flip(1)) != checksum(tensor)
    assert checksum(tensor.T.contiguous()) != checksum(tensor)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_table_covers_transformers_own_tensors(tmp_path: Path, family: str, tied: bool) -> None:
    path = write_model(tmp_path, family, tied, num_key_value_heads=1, vocab_size=333)
    HFReader(path).check(NameTable(read_architecture(path)).hf_tensors())


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3", tied=True)
    expected = NameTable(read_architecture(path)).hf_tensors()
    with pytest.raises(UserError, match="the tensor extra is missing"):
        HFReader(path).check(expected | {"extra": (1,)})
    with pytest.raises(UserError, match=r"model.norm.weight has the shape \[64\]; config.json calls for \[65\]"):
        HFReader(path).check(expected | {"model.norm.weight": (65,)})
    del expected["model.norm.weight"]
    with pytest.raises(UserError, match=r"1 tensors the architecture does not have, first model.norm.weight"):
        HFReader(path).check(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_engines_names_hold_the_same_tensors(tmp_path: Path, family: str) -> None:
    """Without a GPU nothing builds these layers here; the names are those of its modules."""
    table = NameTable(read_architecture(write_model(tmp_path, family, tied=True)))
    renamed = [row for row in FAMILIES[family] if row.transformer_engine]
    assert len(renamed) == (3 if family == "qwen3_moe" else 2)
    for row in renamed:
        assert row.transformer_engine
        local, fused = (
            table.rule(name.format(layer=1, expert=2), 4) for name in (row.megatron, row.transformer_engine)
        )
        assert replace(local, megatron="") == replace(fused, megatron="")
        assert all("layers.1." in name and ("{" not in name) for name in fused.hf)
        assert fused.is_expert == any("experts.6." in name for name in fused.hf)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3", {"model_type": "llama"}, "model_type = 'llama' is not supported .*'qwen2', 'qwen3', 'qwen3_moe'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True: Input should be False"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn': Input should be"),
        ("qwen3", {"head_dim": None}, "head_dim = None: must be a number"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2: Input should be 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]: List should have at most 0"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 is not supported"),
        ("qwen3_moe", {"num_local_experts": None}, "the key num_experts is missing"),
    ],
)
def test_unsupported_architectures_are_refused(tmp_path: Path, family: str, change: dict, message: str) -> None:
    path = write_model(tmp_path, family, tied=True)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        read_architecture(path)
    assert str(file) in str(error.value)
