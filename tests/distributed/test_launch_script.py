"""A launch script as a user starts it by hand: torchrun, a signal, and the same command again. Real vLLM."""

import signal
from pathlib import Path

import pytest

from megatron_opsd.reliability.run_dir import RunDir

from .command_line import Torchrun
from .harness import ROOT
from .runs import Run, began_after, outcome

STEPS = 6


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path / "run"))
    for name in ("MODEL", "DATA", "VENV"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "run"


def launch() -> Torchrun:
    few = ("--train.steps", str(STEPS), "--logging.tensorboard", "false", "--rollout.kv_cache_gib", "0.1")
    return Torchrun(2, str(ROOT / "launch_scripts" / "opsd_tiny.sh"), *few)


def test_a_signalled_launch_script_goes_on_where_it_was(out: Path) -> None:
    with Run(out, launch) as run:
        run.wait_until(lambda: run.steps() == 1)
        run.signal(signal.SIGUSR1, rank=1)
        statuses, output = run.finish()
    assert statuses == [0], output
    assert outcome(out) == "interrupted"
    done = run.steps()
    assert 1 <= done < STEPS
    with Run(out, launch) as run:
        statuses, output = run.finish()
    assert statuses == [0], output
    assert began_after(run) == done
    assert outcome(out) == "finished"
    assert [line["step"] for line in RunDir(out).repeatable_metrics()] == list(range(1, STEPS + 1))
    assert (out / "hf" / "model.safetensors").exists()
