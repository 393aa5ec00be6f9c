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
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"} | {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
VARIABLES = ("MODEL", "DATA", "OUT", "VENV", "SLURM_JOB_ID", "OPSD_HOME", *TORCHRUN)

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
    """Of another method's recipe it is that of its size: RECIPE names the recipe."""
    recipes, of_scripts = set((ROOT / "examples").glob("qwen3_*.toml")), {recipe_of(script) for script in RECIPES}
    assert of_scripts < recipes
    for toml in recipes - of_scripts:
        config, plain = load_config(str(toml), {}), load_config(str(toml.with_stem("qwen3_1p7b")), {})
        assert toml.stem == f"qwen3_1p7b_{config.method.kind}"
        assert config.parallel == plain.parallel


def test_another_recipe(tmp_path: Path) -> None:
    script, paths = ROOT / "launch_scripts" / "opsd_qwen3_1p7b.sh", {"MODEL": "m", "DATA": "d"}
    line = mistake(run(sys.executable, script, tmp_path, **TORCHRUN, **paths, RECIPE="qwen3_1p7b_ppo"))
    assert "examples/qwen3_1p7b_ppo.toml: no such file" in line
    asked = ("--rollout.samples_per_prompt", "1")  # which of the recipes only that of grpo refuses
    line = mistake(run(sys.executable, script, tmp_path, *asked, **TORCHRUN, **paths, RECIPE="qwen3_1p7b_grpo"))
    assert "method.kind = 'grpo' compares responses" in line


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


@pytest.mark.parametrize(("restarts", "named"), [("0", "elsewhere"), ("1", "step_000002")])
def test_a_job_started_again_goes_on_from_its_own_checkpoint(tmp_path: Path, restarts: str, named: str) -> None:
    """Broken on purpose: the line names the checkpoint that is asked for."""
    out = tmp_path / "out"
    for checkpoint in (out / "checkpoints" / "step_000002", tmp_path / "elsewhere"):
        checkpoint.mkdir(parents=True)
        (checkpoint / "progress.json").write_text("{")
    script, job = ROOT / "launch_scripts" / "opsd_tiny.sh", {"OUT": str(out), "SLURM_RESTART_COUNT": restarts}
    resume = ["--checkpoint.resume", str(tmp_path / "elsewhere")]
    line = mistake(run(sys.executable, script, tmp_path, *resume, **TORCHRUN | job))
    assert f"{named}/progress.json: not valid JSON" in line


# In a SLURM job, with stand-ins for SLURM's commands: what srun is asked for. tests/slurm has a real SLURM.

STAND_INS = {
    "scontrol": """case $2 in
        hostnames) printf 'node1\\nnode2\\n' ;;
        node) echo "   NodeAddr=$NODE_ADDR NodeHostName=$3 Version=22.05.8" ;;
        job) echo "   JobState=RUNNING Reason=None" ;;
    esac""",
    "squeue": "echo $LIVING",
    "srun": """printf '%s\\n' "MODEL=$MODEL" "DATA=$DATA" "$@" >$OUT/srun; echo "finished: all steps" >$OUT/outcome""",
    "torchrun": "",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VENV": str(tmp_path),
        "OUT": str(tmp_path / "out"),
        "NODE_ADDR": "10.0.0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
    }


RECIPE = ROOT / "launch_scripts" / "opsd_qwen3_32b.sh"
TINY = ROOT / "launch_scripts" / "opsd_tiny.sh"


def asked(job: dict[str, str], script: Path, cwd: Path, *arguments: str, **environment: str) -> list[str]:
    """What a job asks of srun."""
    done = run("bash", script, cwd, *arguments, **job | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return (Path(job["OUT"]) / "srun").read_text().splitlines()


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    ("known", "host"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("node1.cluster", "node1.cluster"),
        ("127.0.1.1", "node1"),  # Debian's idea of a host's own address
        ("localhost", "node1"),
        ("::1", "node1"),
        ("", "node1"),
        ("fd00::17", "[fd00::17]"),
    ],
)
def test_nodes_meet_where_all_can_reach(job: dict[str, str], tmp_path: Path, known: str, host: str) -> None:
    words = asked(job, RECIPE, tmp_path, NODE_ADDR=known)
    assert after(words, "--rdzv-endpoint") == f"{host}:20007"
    assert after(words, "--nnodes") == "2"
    assert after(words, "--checkpoint.signal_lead_seconds") == "600"


def test_a_process_for_each_gpu(job: dict[str, str], tmp_path: Path) -> None:
    assert after(asked(job, RECIPE, tmp_path), "--nproc-per-node") == "8"
    assert after(asked(job, TINY, tmp_path), "--nproc-per-node") == "8"
    no_gpus = {name: value for name, value in job.items() if name != "SLURM_GPUS_ON_NODE"}
    assert after(asked(no_gpus, TINY, tmp_path), "--nproc-per-node") == "64"


@pytest.mark.parametrize("gpus", ["", "0"])
def test_no_gpus_where_the_head_asks_for_them(job: dict[str, str], tmp_path: Path, gpus: str) -> None:
    line = mistake(run("bash", RECIPE, tmp_path, **job | {"SLURM_GPUS_ON_NODE": gpus}))
    expected = "SLURM_GPUS_ON_NODE is not set: the job got no GPUs; say sbatch --gpus-per-node=N or --gres=gpu:N"
    assert line == f"{RECIPE.name}: {expected}"
    assert not (tmp_path / "out").exists()


def test_no_cpus(job: dict[str, str], tmp_path: Path) -> None:
    line = mistake(run("bash", TINY, tmp_path, **job | {"SLURM_CPUS_PER_TASK": ""}))
    assert line == f"{TINY.name}: SLURM_CPUS_PER_TASK is not set; say sbatch --cpus-per-task=N"


def test_another_living_job_has_the_folder(job: dict[str, str], tmp_path: Path) -> None:
    asked(job, TINY, tmp_path)
    later = job | {"SLURM_JOB_ID": "8"}
    line = mistake(run("bash", TINY, tmp_path, **later | {"LIVING": "RUNNING"}))
    assert line == f"{TINY.name}: OUT={job['OUT']}: job 7 (RUNNING) trains there; scancel it, or choose another OUT"
    assert (tmp_path / "out" / "outcome").read_text() == "finished: all steps\n"
    asked(later, TINY, tmp_path)
    assert (tmp_path / "out" / "restarts").read_text() == "8 1 none\n"
    asked(later, TINY, tmp_path, LIVING="RUNNING")  # the same job, started again


def test_a_refused_start_is_not_started_again(job: dict[str, str], tmp_path: Path) -> None:
    """The folder is that of a run without a job, whose outcome it is not."""
    refusal = "#!/bin/bash\necho 'process 4 on node9 trains there' >$OUT/refused_$SLURM_JOB_ID\n"
    (tmp_path / "bin" / "srun").write_text(refusal)
    done = run("bash", TINY, tmp_path, **job)
    assert done.returncode == 1
    assert done.stderr == f"{TINY.name}: process 4 on node9 trains there\n"
    assert not (tmp_path / "out" / "refused_7").exists()
    assert not (tmp_path / "out" / "outcome").exists()


def test_relative_paths_become_absolute(job: dict[str, str], tmp_path: Path) -> None:
    """Whatever the working directory of a container. Ids of the hub, and what is not there, stay as they are."""
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for name in ("train", "test"):
        (tmp_path / f"{name} set.jsonl").touch()
    evaluate = "--evaluate.data.path"
    words = asked(
        job, TINY, tmp_path, evaluate, "test set.jsonl", "--x", "model", MODEL="link", DATA="./train set.jsonl"
    )
    assert words[:2] == [f"MODEL={tmp_path}/model", f"DATA={tmp_path}/train set.jsonl"]
    assert words[-4:] == [evaluate, f"{tmp_path}/test set.jsonl", "--x", "model"]
    words = asked(job, TINY, tmp_path, f"{evaluate}=test set.jsonl", MODEL="Qwen/Qwen3-8B", DATA="openai/gsm8k")
    assert words[:2] == ["MODEL=Qwen/Qwen3-8B", "DATA=openai/gsm8k"]
    assert words[-1] == f"{evaluate}={tmp_path}/test set.jsonl"


def test_a_container_sees_what_the_run_reads(job: dict[str, str], tmp_path: Path) -> None:
    """Also the files that a model of the hub's cache, and a data file, link to."""
    snapshot = tmp_path / "hub" / "snapshots" / "1234"
    for folder in (snapshot, tmp_path / "hub" / "blobs", tmp_path / "data", tmp_path / "raw", tmp_path / "held out"):
        folder.mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "abcd").touch()
    (tmp_path / "raw" / "1").touch()
    (tmp_path / "held out" / "test.jsonl").touch()
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    (tmp_path / "data" / "train.jsonl").symlink_to("../raw/1")
    paths = {"MODEL": "hub/snapshots/1234", "DATA": "data/train.jsonl", "CONTAINER_IMAGE": "image.sqsh"}
    words = asked(job, TINY, tmp_path, "--evaluate.data.path", "held out/test.jsonl", **paths)
    folders = [
        ROOT,
        tmp_path / "out",
        snapshot,
        *(tmp_path / name for name in ("hub/blobs", "data", "raw", "held out")),
    ]
    (mounts,) = (word for word in words if word.startswith("--container-mounts="))
    expected = {f"{folder}:{folder}" for folder in folders}
    assert set(mounts.removeprefix("--container-mounts=").split(",")) == expected
    assert f"--container-workdir={ROOT}" in words
    assert f"DATA={tmp_path}/data/train.jsonl" in words
    words = asked(job, TINY, tmp_path, **paths, CONTAINER_MOUNTS="/a:/b")
    assert "--container-mounts=/a:/b" in words


def test_a_container_mounts_no_comma(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    done = run("bash", TINY, tmp_path, **job | {"MODEL": "a,b", "CONTAINER_IMAGE": "image.sqsh"})
    line = mistake(done)
    assert line == f"{TINY.name}: {tmp_path}/a,b: pyxis cannot mount it, for its comma or colon; rename it"
