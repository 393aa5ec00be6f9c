"""The example that uses the objective without the rest."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "arithmetic" / "base"


def test_one_model_comes_nearer_to_another(tmp_path: Path) -> None:
    student = shutil.copytree(BASE, tmp_path / "student")
    weights = load_file(BASE / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    moved = {name: x + 0.02 * torch.randn(x.shape, generator=noise) for name, x in weights.items()}
    save_file(moved, student / "model.safetensors", metadata={"format": "pt"})
    script = ROOT / "examples" / "objective" / "two_models.py"
    command = [sys.executable, str(script), str(student), str(BASE), "Compute 123+456."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    divergences = [float(value) for value in re.findall(r"divergence ([\d.]+)", done.stdout)]
    assert len(divergences) == 5
    assert 0 < divergences[-1] < 0.95 * divergences[0]
