"""Bad inputs as data: what a person got wrong, and what the one line says to it. test_bad_inputs.py tries every row."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opsd.config_file import load_config
from megatron_opsd.reliability.resume import meaning

ARITHMETIC = Path(__file__).parents[3] / "examples" / "arithmetic"
ROW = {"problem": "Compute 1+1.", "solution": r"1+1 is \boxed{2}.", "answer": "2"}
TOML = """
[model]
path = "{folder}/model"
dtype = "float32"
[data]
path = "{folder}/train.jsonl"
answer_column = "answer"
max_problem_tokens = 64
max_solution_tokens = 128
[evaluate]
data = {{ path = "{folder}/test.jsonl", answer_column = "answer" }}
[prompts]
teacher_thinking = false
[rollout]
max_response_tokens = 64
kv_cache_gib = 0.05
[optim]
warmup_steps = 0
[train]
steps = 2
global_batch_size = 4
[logging]
run_dir = "{folder}/run"
"""


class Inputs:
    """Inputs in which no command finds a mistake, to be spoilt: a model, two data files, a run.toml."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.toml = folder, folder / "model", folder / "run.toml"
        shutil.copytree(ARITHMETIC / "base", self.model)
        self.toml.write_text(TOML.format(folder=folder))
        self.rows([ROW] * 4)
        self.rows([ROW | {"problem": "Compute 2+2.", "answer": "4"}], "test.jsonl")

    def rows(self, rows: Sequence[Any], name: str = "train.jsonl") -> None:
        """Write a data file."""
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, name: str, contents: str | bytes) -> None:
        """Write any file below the folder."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents.encode() if isinstance(contents, str) else contents)

    def change(self, name: str, **keys: Any) -> None:
        """Change keys of a JSON file below the folder; a value of ``...`` removes the key."""
        file = self.folder / name
        merged = json.loads(file.read_text()) | keys
        file.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))

    def earlier_run(self, step: int = 2, **progress: Any) -> Path:
        """Make the run's folder one with a checkpoint after ``step`` steps; returns the checkpoint's folder."""
        checkpoint = self.folder / "run" / "checkpoints" / f"step_{step:06d}"
        known = {"step": step, "sampler": {}, "teacher": "", "meaning": meaning(load_config(str(self.toml), {}))}
        self.write(f"run/checkpoints/{checkpoint.name}/progress.json", json.dumps(known | progress))
        return checkpoint

    def config(self, **keys: Any) -> None:
        """Change the model's config.json."""
        self.change("model/config.json", **keys)


Change = Callable[[Inputs], object]


@dataclass(frozen=True)
class Bad:
    """One row.

    says: parts of the line: the file, the field, the value, the remedy.
    change: what is done to inputs without a mistake.
    settings: of the command line.
    command: ``check``, ``train``, ``evaluate``, ``serve``, ``plan`` or ``convert``, with its own options.
        ``{folder}`` is replaced, in ``says`` and in ``settings`` too.
    """

    what: str
    says: Sequence[str]
    change: Change = lambda inputs: None
    settings: dict[str, str] = field(default_factory=dict)
    command: Sequence[str] = ("check",)
    environment: dict[str, str] = field(default_factory=dict)
