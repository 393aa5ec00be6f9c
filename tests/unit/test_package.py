"""The shape of the package: imports point one way, every setting explains itself, every mistake costs one line."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_opsd
from megatron_opsd.cli import main
from megatron_opsd.config_file import dump_toml, fields, load_config

PACKAGE = Path(megatron_opsd.__file__).parent

# The rooms of docs/architecture.md. A module imports only from its own room and from those before it.
ROOMS = [
    ["errors", "types", "events", "files", "config", "config_file"],
    ["data", "objective", "weights"],
    ["compat"],
    ["model"],
    ["rollout"],
    ["reliability", "telemetry"],
    ["device_memory", "evaluate", "methods"],
    ["trainer"],
    ["run"],
    ["plan", "convert"],
    ["torchrun", "cli", "launch", "__main__"],
]
ORDER = [room for rooms in ROOMS for room in rooms]

# What these may import beside the standard library.
PURE = {
    "objective": {"torch", "triton", "megatron_opsd.objective"},
    "weights/mapping.py": {"torch", "megatron_opsd.weights.architecture", "megatron_opsd.weights.tables"},
    "weights/architecture.py": {
        "megatron_opsd.errors",
        "megatron_opsd.files",
        "megatron_opsd.weights.hf_config",
        "megatron_opsd.weights.published",
        "megatron_opsd.weights.tables",
    },
    "weights/hf_config.py": {"pydantic", "megatron_opsd.files", "megatron_opsd.weights.tables"},
    "weights/published.py": set(),
    "weights/tables.py": set(),
}

MINIMAL = """
[model]
path = "a model"

[data]
path = "some data"
"""


def imports(file: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports anywhere, types included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module
            yield node.module
            # `from package import name`: the name may be a module, and then it is what is imported.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_imports() -> Iterator[tuple[str, str]]:
    """(importing, imported) pairs of files and modules, the package's own `__init__` aside."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != PACKAGE / "__init__.py":
            for name in imports(file):
                yield str(file.relative_to(PACKAGE)), name


def room(name: str) -> str:
    """`rollout/refit.py` and `megatron_opsd.rollout.refit` both belong to `rollout`."""
    return name.removeprefix("megatron_opsd.").replace("/", ".").removesuffix(".py").split(".")[0]


def test_every_module_has_a_room() -> None:
    modules = {room(str(path.relative_to(PACKAGE))) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


def test_imports_point_one_way() -> None:
    for importing, imported in package_imports():
        if imported.startswith("megatron_opsd.") and room(imported) != room(importing):
            assert ORDER.index(room(imported)) < ORDER.index(room(importing)), f"{importing} imports {imported}"


@pytest.mark.parametrize("part", PURE)
def test_pure_parts_import_little(part: str) -> None:
    for importing, imported in package_imports():
        if importing.startswith(part) and imported.split(".")[0] not in sys.stdlib_module_names:
            allowed = any(imported == name or imported.startswith(f"{name}.") for name in PURE[part])
            assert allowed, f"{importing} imports {imported}"


@pytest.mark.parametrize("name", ["megatron_opsd.compat.cpu", "megatron.core.parallel_state"])
def test_only_parallel_touches_global_state(name: str) -> None:
    users = {importing for importing, imported in package_imports() if (imported + ".").startswith(f"{name}.")}
    assert users == {"model/parallel.py"}


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("config_file", "torch"),
        ("plan.preflight", "megatron"),  # it refuses a Transformer Engine that breaks Megatron's import
        ("convert.convert", "megatron"),
        ("cli", "torch"),
    ],
)
def test_what_comes_first_imports_little(module: str, late: str) -> None:
    code = f"import sys, megatron_opsd.{module}; assert '{late}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_setting_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    words = capsys.readouterr().out.split()
    for name, field in fields().items():
        assert field.description, name
        assert f"--{name}" in words, name


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    overrides = {
        "prompts.student_template": r'"{problem}\n\nA \"quoted\" \\boxed{} – über."',
        "optim.lr": "1e-7",
        "rollout.top_k": "-1",
        "evaluate.data.path": "test.jsonl",
        "evaluate.limit": "64",
        "parallel.tensor_model_parallel_size": "2",
        "parallel.sequence_parallel": "true",
    }
    config = load_config(str(file), overrides)
    assert config.prompts.student_template == '{problem}\n\nA "quoted" \\boxed{} – über.'
    assert config.evaluate.data
    assert config.evaluate.data.path == "test.jsonl"
    file.write_text(dump_toml(config))
    assert load_config(str(file), {}) == config


def test_file_of_the_example_is_valid() -> None:
    load_config(str(PACKAGE.parent / "examples" / "arithmetic" / "opsd.toml"), {})


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("[optim]\nlrr = 1.0", [], "{file}: optim.lrr: unknown key; the nearest valid one is optim.lr"),
        ("[optin]\nlr = 1.0", [], "{file}: optin: unknown key; the nearest valid one is optim"),
        ('[optim]\nlr = "fast"', [], "{file}: optim.lr = 'fast': Input should be a valid number"),
        ("[optim]\nlr = -1.0", [], "{file}: optim.lr = -1.0: Input should be greater than 0"),
        ("[train]\nsteps = 1.5", [], "{file}: train.steps = 1.5: Input should be a valid integer"),
        ("[optim", [], "{file}: not valid TOML"),
        ("", ["--train.steps", "many"], "--train.steps = 'many': Input should be a valid integer"),
        ("", ["--train.steps", "0"], "--train.steps = 0: Input should be greater than 0"),
        ("", ["--model.dtype", "float16"], "--model.dtype = 'float16': Input should be 'bfloat16' or 'float32'"),
        ("", ["--optim.lrr", "1.0"], "--optim.lrr: unknown option; the nearest valid one is --optim.lr"),
        ("", ["--optim.l", "1.0"], "--optim.l: unknown option; the nearest valid one is --optim.lr"),
        ("", ["--evaluate.data.split", "x"], "evaluate.data.path: missing"),
    ],
)
def test_a_mistake_costs_one_line(
    text: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL + text)
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(file), *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message.format(file=file) in lines[0]


def test_missing_file_and_missing_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(file)])
    file.write_text('[model]\npath = "a model"')
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(file)])
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"opsd: {file}: no such file; name the configuration of a run"
    assert second.startswith(f"opsd: {file}: data.path: missing")
