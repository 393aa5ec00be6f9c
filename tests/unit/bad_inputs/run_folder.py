"""Who may write to the run's folder, and whether it can be written to."""

import json
import shutil

from megatron_opsd.config import TEACHER_TEMPLATE

from . import Bad, Inputs

TRAIN = ("train",)
LINE = '{"step": 1}\n'


def left(what: str, file: str, contents: str = LINE) -> Bad:
    """A row in which one file of an earlier run is there."""
    name = file.removeprefix("run/").split("/")[0]
    says = ["logging.run_dir", f"holds an earlier run ({name})", "--checkpoint.resume auto", "--logging.run_dir"]
    return Bad(what, says, lambda i: i.write(file, contents))


def link(inputs: Inputs, name: str) -> None:
    (inputs.folder / "run").mkdir()
    (inputs.folder / "run" / name).symlink_to("nowhere")


def alone(what: str, variable: str) -> Bad:
    """A row in which processes were started together that do not know of each other."""
    says = [f"{variable} = 4", "side by side", "torchrun", "unset"]
    return Bad(what, says, command=TRAIN, environment={variable: "4"})


def not_torchrun(what: str, says: list[str], **environment: str) -> Bad:
    whole = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
    return Bad(what, [*says, "torchrun"], command=TRAIN, environment=whole | environment)


DISTILL = {"method.kind": "distill", "checkpoint.resume": "auto"}


WRITTEN = json.dumps(
    {
        "train.seed": 0,
        "prompts.teacher_template": TEACHER_TEMPLATE,
        "prompts.student_thinking": False,
        "rollout.max_response_tokens": 64,
        "rollout.temperature": 1.1,
        "rollout.top_p": 0.95,
        "rollout.top_k": 20,
        "rollout.samples_per_prompt": 1,
        "the model": "other",
    }
)


def written(what: str, says: list[str], first_line: str) -> Bad:
    """A row in which a run has begun to write responses before its first step."""
    return Bad(what, ["run/written.jsonl", *says], lambda i: i.write("run/written.jsonl", first_line), DISTILL)


ROWS = [
    left("responses that were written before the first step", "run/written.jsonl"),
    written("responses of other settings", ["train.seed = 7", "now is 0", "--logging.run_dir"], '{"train.seed": 7}\n'),
    written("responses without their settings", ["train.seed = None", "now is 0"], "[]\n"),
    written("responses of another model", ["the model = 'other'", "--logging.run_dir"], f"{WRITTEN}\n"),
    written("responses that are none", ["written.jsonl:1", "not valid JSON"], "hello\n"),
    Bad("a name that is too long", ["logging.run_dir", "too long"], settings={"logging.run_dir": "x" * 300}),
    Bad("a link to nowhere inside", ["run/hf", "link to nowhere"], lambda i: link(i, "hf")),
    Bad("metrics that lead nowhere", ["run/metrics.jsonl", "link to nowhere"], lambda i: link(i, "metrics.jsonl")),
    Bad("a lock that is none", ["run/lock", "not the lock of a run", "remove it"], lambda i: i.write("run/lock", "x")),
    Bad("a lock that is a folder", ["run/lock", "remove it"], lambda i: i.write("run/lock/x", "x")),
    Bad(
        "into the model that it starts from",
        ["logging.run_dir", "would write into model.path", "choose another folder"],
        settings={"logging.run_dir": "{folder}/model"},
    ),
    Bad(
        "over the model that it starts from",
        ["logging.run_dir", "would write into model.path"],
        lambda i: shutil.copytree(i.model, i.folder / "run" / "hf"),
        {"model.path": "{folder}/run/hf", "checkpoint.resume": "auto"},
    ),
    left("metrics of an earlier run", "run/metrics.jsonl"),
    left("evaluations of an earlier run", "run/evaluations.jsonl"),
    left("rollouts of an earlier run", "run/rollouts/step_000001.jsonl"),
    left("skipped batches of an earlier run", "run/skipped/step_000001.jsonl"),
    left("a model of an earlier run", "run/hf/config.json"),
    Bad("no name", ["logging.run_dir", "''", "at least 1 character"], settings={"logging.run_dir": ""}),
    Bad(
        "a file in the way of the folder",
        ["logging.run_dir", "cannot write to", "run", "Not a directory"],
        lambda i: i.write("run", ""),
    ),
    Bad(
        "a file in the way of a parent",
        ["logging.run_dir", "cannot write to", "run.toml", "Not a directory"],
        settings={"logging.run_dir": "{folder}/run.toml/deeper/run"},
    ),
    Bad("a link to nowhere", ["logging.run_dir", "cannot write to"], lambda i: (i.folder / "run").symlink_to("none")),
    Bad(
        "checkpoints is a file", ["checkpoints is no folder", "move it away"], lambda i: i.write("run/checkpoints", "")
    ),
    Bad("hf is a file", ["hf is no folder", "move it away"], lambda i: i.write("run/hf", "")),
    Bad("logs is a file", ["logs is no folder", "move it away"], lambda i: i.write("run/logs", "")),
    Bad(
        "metrics.jsonl is a folder",
        ["metrics.jsonl is a folder", "move it away"],
        lambda i: i.write("run/metrics.jsonl/file", ""),
    ),
    Bad(
        "anybody may write to it",
        ["logging.run_dir", "anybody may write to it", "chmod o-w"],
        lambda i: ((i.folder / "run").mkdir(), (i.folder / "run").chmod(0o777)),
    ),
    Bad("a device", ["logging.run_dir", "cannot write to /dev/null"], settings={"logging.run_dir": "/dev/null"}),
    Bad("the kernel's files", ["logging.run_dir", "cannot write to /proc"], settings={"logging.run_dir": "/proc/run"}),
    alone("processes of srun without torchrun", "SLURM_NTASKS"),
    alone("processes of mpirun without torchrun", "OMPI_COMM_WORLD_SIZE"),
    alone("a world without ranks", "WORLD_SIZE"),
    not_torchrun("a rank beyond the world", ["RANK = 3", "WORLD_SIZE = 2"], RANK="3", WORLD_SIZE="2"),
    not_torchrun("a rank that is no number", ["RANK is 'x'"], RANK="x"),
    not_torchrun("half of torchrun's variables", ["WORLD_SIZE is ''"], WORLD_SIZE=""),
    Bad("a port that is none", ["MASTER_PORT = 'x'", "unset"], command=TRAIN, environment={"MASTER_PORT": "x"}),
    not_torchrun("no address", ["MASTER_ADDR is missing"]),
]
