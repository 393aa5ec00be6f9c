"""What a person sees: the line of progress, a run's step in words, and how an evaluation gets on."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_opsd import evaluate
from megatron_opsd.config import Config, DataConfig, LoggingConfig, ModelConfig, TrainConfig
from megatron_opsd.rollout.engine import NoEngine
from megatron_opsd.telemetry.metrics import MetricsWriter
from megatron_opsd.types import Phase, StepResult

from .bad_inputs import ARITHMETIC

METRICS = {
    "step": 12.0,
    "loss": 0.01234,
    "divergence": 0.23456,
    "accuracy": 0.5,
    "grad_norm": 0.1,
    "samples": 4.0,
    "skipped": 0.0,
    "tokens_per_second": 100.0,
    "seconds_total": 1.5,
    **{f"seconds_{phase}": 0.25 for phase in Phase},
}


@pytest.fixture
def writer(tmp_path: Path) -> MetricsWriter:
    config = Config(
        model=ModelConfig(path=str(ARITHMETIC / "base")),
        data=DataConfig(path="data.jsonl"),
        train=TrainConfig(steps=1000),
        logging=LoggingConfig(run_dir=str(tmp_path), tensorboard=False, rollouts_interval=0),
    )
    return MetricsWriter(config, AutoTokenizer.from_pretrained(config.model.path), 0, enabled=True)


def test_eighty_columns_hold_what_matters(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal: step, time left, loss, the divergence before the clip, accuracy."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with request.getfixturevalue("writer") as writer:
        writer.step(StepResult(METRICS, []))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).replace("\r", "\n").splitlines()
    shown = [line for line in lines if "12/1000" in line]
    assert shown
    assert all(len(line) <= 80 for line in lines)
    assert re.search(r"step +12/1000 \S+ [-0-9:]+ loss 0\.0123  div 0\.2346  acc 0\.50", shown[-1]), shown[-1]


def test_a_log_has_a_line_for_each_step(writer: MetricsWriter, capsys: pytest.CaptureFixture[str]) -> None:
    with writer:
        writer.step(StepResult(METRICS, []))
        nothing = {name: value for name, value in METRICS.items() if name not in ("loss", "divergence", "accuracy")}
        writer.step(StepResult(nothing | {"step": 13.0}, []))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "step 12  loss 0.0123  div 0.2346  acc 0.50  grad 0.10  100 tokens/s  1.50 s (rollout 0.25 "
    )
    assert second.startswith("step 13  loss -  grad 0.10")


def test_an_evaluation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two calls of the engine: greedy and sampled."""
    monkeypatch.setattr(evaluate, "SPEAK_SECONDS", 0.0)
    engine = NoEngine()
    with evaluate._Progress(engine, total=30, rank=0) as progress:
        for engine.finished in (0, 5, 10, 0, 4, 20):
            assert not progress.update()
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == [5, 10, 10, 14, 30]
    assert lines[0].startswith("5 of 30 responses are written; about 0.0 minutes left")
