"""What the colocated engine asks of vLLM, and in which order, where a GPU would be needed to see it happen."""

import atexit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opsd.config import Config
from megatron_opsd.rollout import colocated
from megatron_opsd.rollout.colocated import ColocatedVLLM
from megatron_opsd.rollout.engine import RefitError, Sampling


class Recorder:
    """Stands in for vLLM's LLM and writes down what is asked of its memory."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.resets = True
        core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=core, model_config=None)

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls += [f"wake {tag}" for tag in tags]

    def reset_prefix_cache(self) -> bool:
        return self.resets

    def apply_model(self, _: Callable[..., object]) -> None: ...

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        list(kwargs["weights_iterator"])


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    llm = Recorder()
    monkeypatch.setattr(colocated, "_start", lambda *_: llm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else nothing sleeps
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    return llm


def build() -> ColocatedVLLM:
    return ColocatedVLLM(Config.model_validate({"model": {"path": "unread"}, "data": {"path": "unread"}}), 128)


def test_close_wakes_what_sleeps_before_the_shutdown(llm: Recorder) -> None:
    engine = build()
    engine.sleep()
    engine.close()
    assert llm.calls == ["sleep 2", "wake weights", "wake kv_cache", "shutdown"]


def test_close_wakes_nothing_twice(llm: Recorder) -> None:
    engine = build()
    engine.sleep()
    engine.wake_up_weights()  # as after the last refit
    engine.close()
    assert llm.calls == ["sleep 2", "wake weights", "wake kv_cache", "shutdown"]


def test_a_run_that_ends_with_an_error_wakes_it_too(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    build().sleep()
    for function in at_exit:
        function()
    assert llm.calls == ["sleep 2", "wake weights", "wake kv_cache"]


def test_a_prefix_cache_that_stays_stops_the_run(llm: Recorder) -> None:
    """Its answers would come from the weights before."""
    engine = build()
    llm.resets = False
    with pytest.raises(RefitError, match="did not reset its prefix cache"):
        engine.update_weights([], version=1)
    with pytest.raises(AssertionError, match="refit before"):
        engine.generate([[1]], Sampling(1), [0])
