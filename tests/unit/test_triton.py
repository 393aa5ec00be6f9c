"""The Triton backend without a GPU: in Triton's interpreter, and through its compiler."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_opsd.objective import Divergence, backend_triton

CASES = Path(__file__).with_name("triton_cases.py")


def test_triton_backend_in_the_interpreter() -> None:
    """In a process of its own, for Triton decides at its first import whether it interprets."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize("name", ["_normalizer_kernel", "_entry_kernel", "_gradient_kernel"])
def test_kernels_compile_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Hopper, which needs none: loads of 16 bytes, and every value in a register."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(backend_triton, name)
    spec = Divergence(kind="jsd", clip=0.2)
    constants = {"DTYPE": tl.float32, "LOWEST": torch.finfo(torch.float32).min, "LANES": backend_triton.LANES}
    if name == "_normalizer_kernel":
        constants |= {"TERMS": 12, "TEMPERATURE": 1.1, "SECOND_TEMPERATURE": 1.0}
    else:
        constants |= backend_triton._constants(spec, torch.float32)
    names = list(inspect.signature(kernel.fn).parameters)
    constants |= dict.fromkeys((each for each in names if each.endswith("_column")), 1)  # as Triton specialises them
    logits = {"student", "teacher"} | ({"out"} if name == "_gradient_kernel" else set())
    types = {each: "*bf16" if each in logits else "*fp32" for each in names}
    types |= dict.fromkeys(("width", "n", *(each for each in names if each.endswith("_row"))), "i32")
    types |= {"top_ids": "*i64"} | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, each in enumerate(names) if types[each].startswith("*") or each.endswith("_row")]
    source = ASTSource(
        kernel,
        {each: types[each] for each in names},
        {(names.index(each),): value for each, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled: Any = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": backend_triton.WARPS, "enable_fp_fusion": True}
    )
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", binary], capture_output=True, text=True, check=True
    )
    assert "STACK:0" in usage.stdout
    assert "LOCAL:0" in usage.stdout
