"""The smoke test as a user starts it, tiny and on the CPU; and that each check fails where something is broken."""

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import smoke
import smoke_checks
import torch
from safetensors.torch import save_file

from megatron_opsd.reliability.run_dir import read_jsonl, write_jsonl

from .command_line import run
from .harness import ROOT

GOOD_LOGITS = {"ours": 1.9e-2, "theirs": 1e-2, "dtype": "bfloat16", "layers": "Transformer Engine layers, TP 2"}
EXPECTED = smoke_checks.Expected(weights=1.1, teacher=0.8, gradients=2.2, states=6.7)
# GiB that each move leaves free, of 80, in the order of a step; the cache has 30.
STEP = {
    "KV cache on": (71.5, 41.5),
    "vLLM off": (41.5, 72.6),
    "teacher on": (72.6, 71.8),
    "teacher off": (71.8, 72.6),
    "gradients on": (72.6, 70.4),
    "optimizer states on": (70.4, 63.7),
    "optimizer states off": (63.7, 70.4),
    "gradients off": (70.4, 72.6),
    "vLLM's weights on": (72.6, 71.5),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the script has left."""
    out = tmp_path_factory.mktemp("smoke") / "out"
    environment = {"OUT": str(out), "VENV": str(Path(sys.executable).parents[1])}
    done = run(["bash", str(ROOT / "launch_scripts" / "smoke_gpu.sh"), "--ranks", "1"], **environment)
    (out / "said").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_everything_passes(out: Path) -> None:
    said = (out / "said").read_text()
    verdicts = re.findall(r"^(PASS|FAIL|SKIP) ([^:]*): .", said, flags=re.MULTILINE)
    passed = ("logits", "end of the run", "refit gap", "memory", "end of the resumed", "checkpoint and resume")
    assert verdicts == [("SKIP" if name == "memory" else "PASS", name) for name in passed]
    assert "8 of 8 rollouts the same" in said
    assert re.search(r"^step +rollout +teacher +student +optimizer +refit +total +tokens/s +peak GiB *$", said, re.M)
    assert re.search(r"^ +3( +[0-9.]+){8} *$", said, re.M)
    assert "megatron-core 0." in said
    assert "no GPU" in said
    assert not (out / "model").exists()  # what is large goes when it is not needed
    assert (out / "run" / "metrics.jsonl").exists()


@pytest.mark.thorough
def test_a_folder_in_use_is_refused(out: Path) -> None:
    done = run([sys.executable, str(ROOT / "tools" / "smoke.py"), "--out", str(out)])
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert (out / "run" / "metrics.jsonl").exists()


def edit(file: Path, change: Callable[[dict], None]) -> None:
    """Change the last line of a JSONL."""
    lines = read_jsonl(file)
    change(lines[-1])
    write_jsonl(file, lines)


@pytest.mark.parametrize("gap", [2e-4, None], ids=["large", "not finite"])
def test_a_refit_gap_fails(tmp_path: Path, gap: float | None) -> None:
    write_run(tmp_path)
    assert smoke_checks.check_refit(tmp_path, "float32").verdict == "PASS"
    edit(tmp_path / "metrics.jsonl", lambda line: line.update(refit_logprob_gap=gap))
    found = smoke_checks.check_refit(tmp_path, "float32")
    assert found.verdict == "FAIL"
    assert "; look at megatron_opsd/rollout/refit.py" in found.numbers


def write_run(run_dir: Path) -> None:
    """What the checks read of a run of three steps with eight rollouts."""
    (run_dir / "rollouts").mkdir(parents=True)
    metrics = [
        {
            "step": step,
            "loss": 0.5 / step,
            "grad_norm": 1.5,
            "refit_logprob_gap": 2e-6,
            "seconds_total": random.random(),
        }
        for step in (1, 2, 3)
    ]
    write_jsonl(run_dir / "metrics.jsonl", metrics)
    write_jsonl(run_dir / "rollouts" / "step_000003.jsonl", [{"token_ids": [i, 2]} for i in range(8)])


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The unbroken run, the resumed one, and the model both began with."""
    for name in ("run", "resumed"):
        write_run(tmp_path / name)
    for name, weight in {"run/hf": 2.0, "resumed/hf": 2.0, "model": 1.0}.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file({"weight": torch.full((4,), weight)}, folder / "model.safetensors")
    return tmp_path / "run", tmp_path / "resumed", tmp_path / "model"


def test_a_resume_that_differs_fails(runs: tuple[Path, Path, Path]) -> None:
    _, resumed, _ = runs
    assert smoke_checks.check_resume(*runs, exact=True).verdict == "PASS"
    edit(resumed / "metrics.jsonl", lambda line: line.update(grad_norm=1.001 * line["grad_norm"]))
    assert smoke_checks.check_resume(*runs, exact=False).verdict == "PASS"
    assert "different: grad_norm" in smoke_checks.check_resume(*runs, exact=True).numbers
    edit(resumed / "metrics.jsonl", lambda line: line.update(loss=1.002 * line["loss"]))
    found = smoke_checks.check_resume(*runs, exact=False)
    assert found.verdict == "FAIL"
    assert "loss differs by 2.0e-03 (limit 0.001)" in found.numbers
    edit(resumed / "metrics.jsonl", lambda line: line.update(loss=None))
    assert smoke_checks.check_resume(*runs, exact=False).verdict == "FAIL"


def test_a_resume_with_other_rollouts_or_weights_fails(runs: tuple[Path, Path, Path]) -> None:
    _, resumed, _ = runs
    save_file({"weight": torch.full((4,), 1.8)}, resumed / "hf" / "model.safetensors")
    assert "weights by 2.0e-01 of the run's update" in smoke_checks.check_resume(*runs, exact=False).numbers
    assert smoke_checks.check_resume(*runs, exact=False).verdict == "FAIL"
    save_file({"weight": torch.full((4,), 1.95)}, resumed / "hf" / "model.safetensors")
    assert smoke_checks.check_resume(*runs, exact=False).verdict == "PASS"
    edit(resumed / "rollouts" / "step_000003.jsonl", lambda line: line.update(token_ids=[7]))
    found = smoke_checks.check_resume(*runs, exact=False)
    assert found.verdict == "FAIL"
    assert "7 of 8 rollouts the same" in found.numbers


def test_logits() -> None:
    assert smoke_checks.check_logits(GOOD_LOGITS).verdict == "PASS"
    for broken in ({"ours": 2.1e-2}, {"ours": float("nan")}, {"ours": 2e-5, "dtype": "float32"}):
        assert smoke_checks.check_logits(GOOD_LOGITS | broken).verdict == "FAIL"


def with_moves(run_dir: Path, **changes: tuple[float, float]) -> Path:
    """What a run of three steps leaves; ``changes`` are moves of the last one."""
    (run_dir / "logs").mkdir()
    line = "2026-01-01 00:00:00,000 INFO vllm.v1.worker.gpu_worker: Available KV cache memory: 30.0 GiB\n"
    (run_dir / "logs" / "train_rank_0000.log").write_text(line)
    first = STEP | {"optimizer states on": (70.4, 68.2), "optimizer states off": (68.2, 70.4)}  # no moments yet
    moves = [move for step in (first, STEP, STEP | changes) for move in step.items()]
    events = [{"event": "move", "what": what, "free_gib": free_gib} for what, free_gib in moves]
    write_jsonl(run_dir / "events.jsonl", events)
    return run_dir


def test_memory(tmp_path: Path) -> None:
    found = smoke_checks.check_memory(with_moves(tmp_path), EXPECTED)
    assert {result.verdict for result in found} == {"PASS"}
    assert {result.name for result in found} == {f"memory, {what}" for what in STEP}
    assert str(found[0]) == "PASS memory, vLLM off: frees 31.1 GiB (41.5 to 72.6 GiB free), expected 31.1"


@pytest.mark.parametrize("what", STEP)
def test_memory_that_does_not_move_fails(what: str, tmp_path: Path) -> None:
    """Also where it stays only once."""
    before, _ = STEP[what]
    found = smoke_checks.check_memory(with_moves(tmp_path, **{what: (before, before)}), EXPECTED)
    assert [result.name for result in found if result.verdict == "FAIL"] == [f"memory, {what}"]


def test_a_run_without_moves_fails(tmp_path: Path) -> None:
    (with_moves(tmp_path) / "events.jsonl").write_text("")
    (found,) = smoke_checks.check_memory(tmp_path, EXPECTED)
    assert found.verdict == "FAIL"


def test_a_run_that_dies_at_its_end_fails(tmp_path: Path) -> None:
    """With a status, or only with an error line of vLLM's allocator."""
    printed = tmp_path / "run.txt"
    printed.write_text("step 3  loss 0.1\n")
    assert smoke_checks.check_exit(tmp_path, "run", 0).verdict == "PASS"
    assert smoke_checks.check_exit(tmp_path, "run", 1).verdict == "FAIL"
    printed.write_text("CUDA Error: invalid argument at cumem_allocator.cpp:249\n")
    found = smoke_checks.check_exit(tmp_path, "run", 0)
    assert found.verdict == "FAIL"
    assert "cumem_allocator.cpp:249" in found.numbers


def test_a_command_that_fails_is_quoted(tmp_path: Path) -> None:
    program = "print('loading'); raise ValueError('no such layer')"
    with pytest.raises(smoke.CommandFailedError, match="exit status 1: ValueError: no such layer; look at"):
        smoke.run(tmp_path / "said", sys.executable, "-c", program)
