"""Launch scripts: valid for bash and for Python, consistent with their recipes, one line for each mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opsd.config_file import load_config
from megatron_opsd.launch import torchrun_command

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch_scripts").glob("opsd_*.sh"))
RECIPES = [script for script in SCRIPTS if script.stem != "opsd_tiny"]
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
VARIABLES = ("MODEL", "DATA", "OUT", "SLURM_JOB_ID", "OPSD_HOME", *TORCHRUN)

script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
recipe = pytest.mark.parametrize("script", RECIPES, ids=lambda script: script.stem)


def run(program: str, script: Path, cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [program, script, *arguments],
        env=inherited | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def head(script: Path) -> dict[str, str]:
    """What the ``#SBATCH`` lines ask for."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script.read_text(), flags=re.MULTILINE))


def mistake(done: subprocess.CompletedProcess) -> str:
    """The one line that a mistake costs."""
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def recipe_of(script: Path) -> Path:
    return ROOT / "examples" / f"{script.stem.removeprefix('opsd_')}.toml"


def test_every_recipe_has_a_script() -> None:
    assert {recipe_of(script) for script in RECIPES} == set((ROOT / "examples").glob("qwen3_*.toml"))


@script
def test_bash_and_python_accept_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    compile(script.read_text(), script, "exec")


@script
def test_the_head_asks_for_what_restarts_need(script: Path) -> None:
    asked = head(script)
    assert asked["job-name"] == script.stem
    assert asked["ntasks-per-node"] == "1"  # one torchrun
    assert asked["open-mode"] == "append"
    assert asked["requeue"] == ""
    name, _, seconds = asked["signal"].partition("@")
    assert name == "B:USR1"
    assert int(seconds) >= 60
    assert {"nodes", "time", "cpus-per-task", "output"} < asked.keys()


@recipe
def test_the_head_fits_the_recipe(script: Path) -> None:
    """Its hardware is that of the recipe's first lines, which tests/unit/test_plan.py plans, and its ranks divide."""
    asked, toml = head(script), recipe_of(script)
    planned = f"--nodes {asked['nodes']} --gpus-per-node {asked['gpus-per-node']} "
    assert planned in toml.read_text()
    config = load_config(str(toml), {})
    layout, world_size = config.parallel, int(asked["nodes"]) * int(asked["gpus-per-node"])
    stages = layout.pipeline_model_parallel_size
    assert world_size % (layout.tensor_model_parallel_size * stages) == 0
    assert world_size // stages % layout.expert_model_parallel_size == 0
    assert world_size % config.rollout.tensor_model_parallel_size == 0
    assert config.logging.run_dir == f"runs/{toml.stem}"  # the default of OUT
    assert asked["signal"] == f"B:USR1@{config.checkpoint.signal_lead_seconds:g}"  # what `opsd plan` reckons with


@script
def test_the_comments_say_what_the_head_asks_for(script: Path) -> None:
    asked, command = head(script), torchrun_command(script)
    nodes = f" --nnodes {asked['nodes']} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    processes = asked.get("gpus-per-node", asked["cpus-per-task"])
    several = nodes if asked["nodes"] != "1" else ""
    assert command == f"torchrun{several} --nproc-per-node {processes} launch_scripts/{script.name}"


@script
def test_bash_outside_slurm(script: Path, tmp_path: Path) -> None:
    line = mistake(run("bash", script, tmp_path))
    submit = f"type 'sbatch {script}', or on each node: {torchrun_command(script)}"
    assert line == f"{script.name}: not in a SLURM job; {submit}"
    assert list(tmp_path.iterdir()) == []


@script
def test_python_without_torchrun(script: Path, tmp_path: Path) -> None:
    line = mistake(run(sys.executable, script, tmp_path))
    assert line.startswith(f"{script.name}: needs torchrun, on each node: {torchrun_command(script)}; or")
    assert list(tmp_path.iterdir()) == []


def test_torchrun_without_its_flags(tmp_path: Path) -> None:
    script = ROOT / "launch_scripts" / "opsd_qwen3_32b.sh"
    line = mistake(run(sys.executable, script, tmp_path, **TORCHRUN | {"WORLD_SIZE": "1"}))
    expected = f"torchrun started one process, the model needs 16; on each node: {torchrun_command(script)}"
    assert line == f"{script.name}: {expected}"


def test_missing_variables_stop_the_run_for_good(tmp_path: Path) -> None:
    script = ROOT / "launch_scripts" / "opsd_qwen3_8b.sh"
    line = mistake(run(sys.executable, script, tmp_path, **TORCHRUN))
    assert line.startswith(f"{script.name}: set the environment variables MODEL (a Hugging Face directory) and DATA (")
    assert (tmp_path / "runs/qwen3_8b/outcome").read_text().startswith("stopped: set the environment variables MODEL")
    line = mistake(run(sys.executable, script, tmp_path, **TORCHRUN | {"MODEL": "x", "OUT": str(tmp_path / "out")}))
    assert line.startswith(f"{script.name}: set the environment variable DATA (")
    assert (tmp_path / "out" / "outcome").exists()


def test_other_ranks_say_nothing(tmp_path: Path) -> None:
    script = ROOT / "launch_scripts" / "opsd_qwen3_8b.sh"
    done = run(sys.executable, script, tmp_path, **TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"})
    assert (done.returncode, done.stderr) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_the_command_line_finds_stops_the_run_for_good(tmp_path: Path) -> None:
    script, variables = ROOT / "launch_scripts" / "opsd_tiny.sh", {"OUT": str(tmp_path / "out")}
    line = mistake(run(sys.executable, script, tmp_path, "--optim.lr", "fish", **TORCHRUN | variables))
    assert "optim.lr = 'fish'" in line
    assert (tmp_path / "out" / "outcome").read_text().startswith("stopped: --optim.lr = 'fish'")
    line = mistake(run(sys.executable, script, tmp_path, "--optim.lrr", "1", **TORCHRUN | variables))
    assert line == "opsd: --optim.lrr: unknown option; the nearest valid one is --optim.lr"
    assert "unknown option" in (tmp_path / "out" / "outcome").read_text()


def test_the_command_line_overrides_variables(tmp_path: Path) -> None:
    """A model that is not there is found before anything is loaded, and named."""
    script, variables = ROOT / "launch_scripts" / "opsd_tiny.sh", {"OUT": str(tmp_path / "out"), "MODEL": "/nowhere"}
    line = mistake(run(sys.executable, script, tmp_path, "--model.path", "/not/here", **TORCHRUN | variables))
    assert "/not/here" in line
    assert (tmp_path / "out" / "data" / "train.jsonl").exists()  # DATA was not set
