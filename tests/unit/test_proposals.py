"""What `opsd plan` proposes: layouts that divide, and settings to give back. Each holds what it promises."""

import json
from pathlib import Path

import pytest

from megatron_opsd.cli import main
from megatron_opsd.config import Config
from megatron_opsd.config_file import load_config
from megatron_opsd.plan.formulas import GIB
from megatron_opsd.plan.planner import Cluster, Plan, make_plan
from megatron_opsd.plan.remedies import apply
from megatron_opsd.plan.unneeded import FREE, find_unneeded

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``opsd plan`` hides this machine's GPUs from its process, which here goes on."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def plan_command(recipe: str, nodes: int, gpus: int, gib: int) -> list[str]:
    size = ["--nodes", str(nodes), "--gpus-per-node", str(gpus), "--gpu-memory-gib", str(gib)]
    return ["plan", str(EXAMPLES / f"{recipe}.toml"), *size]


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """The line that a mistake costs: what is wrong, and the options that it proposes."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    what, _, options = line.rpartition(": ")
    return what, options.split()


@pytest.mark.parametrize(
    ("recipe", "cluster", "options"),
    [
        ("qwen3_32b", (3, 8, 79), []),  # 24 ranks
        ("qwen3_32b", (4, 8, 79), ["--parallel.tensor_model_parallel_size", "16"]),
        ("qwen3_32b", (1, 8, 79), []),  # only with remedies besides
        ("qwen3_8b", (1, 5, 79), []),  # vLLM's size does not divide either
        ("qwen3_8b", (1, 8, 79), ["--train.global_batch_size", "30"]),
        ("qwen3_8b", (1, 6, 79), ["--train.micro_batch_size", "2", "--rollout.samples_per_prompt", "4"]),
        ("qwen3_30b_a3b", (2, 8, 79), ["--parallel.tensor_model_parallel_size", "8"]),
        ("qwen3_30b_a3b", (2, 8, 79), ["--parallel.sequence_parallel", "false"]),
    ],
)
def test_a_layout_that_fits(
    recipe: str, cluster: tuple[int, int, int], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user would: add the proposed options to the command."""
    command = [*plan_command(recipe, *cluster), *options]
    what, proposed = mistake(command, capsys)
    assert "; a layout that fits" in what
    main([*command, *proposed])
    assert "It fits" in capsys.readouterr().out


def test_a_layout_that_fits_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer ranks to the model first; of the batch no more changes than must."""
    command = plan_command("qwen3_32b", 3, 8, 79)
    _, proposed = mistake(command, capsys)
    expected = {"--parallel.tensor_model_parallel_size": "4", "--parallel.pipeline_model_parallel_size": "3"}
    assert dict(zip(proposed[::2], proposed[1::2], strict=True)) == expected
    what, proposed = mistake([*plan_command("qwen3_8b", 1, 8, 79), "--train.global_batch_size", "30"], capsys)
    assert "train.global_batch_size = 30 is not a multiple" in what
    assert proposed[:2] == ["--train.global_batch_size", "32"]


def test_no_layout_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """The options still divide, and `plan` says what more would help."""
    command = [*plan_command("qwen3_32b", 1, 8, 20), "--parallel.tensor_model_parallel_size", "3"]
    what, proposed = mistake(command, capsys)
    assert "; a layout that divides, but does not fit" in what
    with pytest.raises(SystemExit, match="1"):
        main([*command, *proposed])
    assert "It does not fit" in capsys.readouterr().out


def test_a_mistake_that_no_layout_repairs_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    what, _ = mistake([*plan_command("qwen3_8b", 1, 8, 79), "--train.packing", "true"], capsys)
    assert what.startswith("opsd: nemo is not installed")
    assert "layout" not in what


CAUTIOUS = {
    "model": {"path": "Qwen3-32B", "recompute": "full"},
    "data": {"path": "unread"},
    "teacher": {"placement": "offload"},
    "optim": {"placement": "offload"},
    "objective": {"chunk_size": 512},
    "parallel": {
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
    "rollout": {"tensor_model_parallel_size": 4, "gpu_memory_utilization": 0.4},
}


def remain(plan: Plan, phase: str) -> int:
    return plan.cluster.gpu_memory - max(stage.totals[phase] for stage in plan.stages)


def test_what_is_not_needed() -> None:
    """One after the other, with what then remains; at the end nothing is left to give back."""
    config, cluster = Config.model_validate(CAUTIOUS), Cluster(4, 8, 141)
    found = find_unneeded(config, cluster)
    changes = {name: value for setting in found for name, value in setting.changes.items()}
    assert changes == {
        "model.recompute": "none",
        "optim.placement": "resident",
        "teacher.placement": "resident",
        "parallel.pipeline_model_parallel_size": 1,
        "objective.chunk_size": 2048,
    }
    for setting in found:
        config, _ = apply(config, cluster, setting.changes)
        plan = make_plan(config, cluster)
        assert setting.remains == remain(plan, setting.phase) >= FREE * cluster.gpu_memory
    assert find_unneeded(config, cluster) == []


def test_what_is_needed_is_left_alone() -> None:
    """A resident teacher would fit, and leave too little besides vLLM. What does not fit has nothing to give back."""
    tight = load_config(str(EXAMPLES / "qwen3_8b.toml"), {"teacher.placement": "offload"})
    cluster = Cluster(1, 8, 79)
    assert make_plan(*apply(tight, cluster, {"teacher.placement": "resident"})).fits
    assert find_unneeded(tight, cluster) == []
    assert find_unneeded(Config.model_validate(CAUTIOUS), Cluster(4, 8, 30)) == []


def test_recomputation_protects_from_uneven_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """235B without it would fit, but not with twice the tokens on one rank's experts."""
    command = [*plan_command("qwen3_235b_a22b", 32, 8, 79), "--json"]
    main(command)
    assert json.loads(capsys.readouterr().out)["unneeded"] == []
    main([*command, "--model.recompute", "none"])
    plan = json.loads(capsys.readouterr().out)
    stages = [stage["phases"]["student"] for stage in plan["stages"]]
    assert plan["fits"]
    most = max(sum(stage.values()) + stage["activations"] for stage in stages)
    assert (79 * GIB - most) / (79 * GIB) < FREE


def test_the_table_says_what_is_not_needed(capsys: pytest.CaptureFixture[str]) -> None:
    main([*plan_command("qwen3_8b", 1, 8, 79), "--model.recompute", "full"])
    lines = capsys.readouterr().out.splitlines()
    line = lines[lines.index("What costs time and is not needed, each with those above it:") + 1]
    assert line.startswith("  --model.recompute none: 21.2 GiB remain in the student phase")
