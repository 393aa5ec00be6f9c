"""What lies on the device in each part of a step, and what the optimizer's states are. tests/gpu moves them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opsd.config import Config
from megatron_opsd.data.batch import Batch, split
from megatron_opsd.data.weighting import Weighting
from megatron_opsd.device_memory import DeviceMemory
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import build_model
from megatron_opsd.model.optimizer import OptimizerStates, build_optimizer, build_schedule, optimizer_step
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import FrozenTeacher
from megatron_opsd.types import Phase
from megatron_opsd.weights.architecture import read_architecture

from .harness import run_distributed
from .tiny import random_samples, write_model

# The table at the top of megatron_opsd/device_memory.py.
PHASES = {
    "refit": {"weights"},
    "rollout": {"weights", "KV cache"},
    "teacher": {"teacher"},
    "student": {"gradients"},
    "optimizer": {"gradients", "states"},
}


def test_what_lies_on_the_device() -> None:
    """Through two steps and an evaluation; two things that take turns are never there together, not for a moment."""
    there = {"gradients", "states", "teacher"}

    def on(*things: str) -> Any:
        def arrive() -> None:
            there.update(things)
            assert there <= {"weights", "KV cache"} or not there & {"weights", "KV cache"}
            assert there <= {"teacher"} or "teacher" not in there

        return arrive

    def off(*things: str) -> Any:
        return lambda: there.difference_update(things)

    engine = SimpleNamespace(
        sleep=off("weights", "KV cache"), wake_up_weights=on("weights"), wake_up_kv_cache=on("KV cache")
    )
    teacher = SimpleNamespace(load=on("teacher"), offload=off("teacher"))
    ddp = SimpleNamespace(restore_grad_buffers=on("gradients"), offload_grad_buffers=off("gradients"))
    states = SimpleNamespace(offloads=True, load=on("states"), offload=off("states"))
    memory: Any = DeviceMemory(engine, teacher, SimpleNamespace(ddp_chunks=[ddp]), states)  # type: ignore[arg-type]
    teacher.offload()
    moves = {phase: getattr(memory, f"for_{phase}") for phase in Phase}
    for phase in [Phase.REFIT, *Phase, Phase.ROLLOUT, *Phase]:  # the second rollout is an evaluation
        moves[phase]()
        assert there == PHASES[phase], phase
    memory.without_training()  # a step that learned nothing
    moves[Phase.REFIT]()
    for _ in range(2):  # steps without rollouts, and then an evaluation
        for phase in (Phase.TEACHER, Phase.STUDENT, Phase.OPTIMIZER):
            moves[phase]()
            assert there == PHASES[phase], phase
        memory.after_training()
        assert not there
    for phase in (Phase.REFIT, Phase.ROLLOUT):
        moves[phase]()
        assert there == PHASES[phase], phase
    for count in range(1, len(Phase) + 1):  # whatever phase a run ends in: vLLM can then wake
        for phase in list(Phase)[:count]:
            moves[phase]()
        memory.for_exit()
        assert there <= {"weights", "KV cache"}, count


def test_the_peak_leaves_out_what_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator counts vLLM's pools also while they sleep, and hold no memory."""
    counted, asleep = 0, 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: counted * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(parallel, "device", lambda: None)
    monkeypatch.setattr(DeviceMemory, "_move", lambda *_: None)
    engine = SimpleNamespace(sleeping_bytes=lambda: asleep * 2**30)
    engine.wake_up_weights = engine.wake_up_kv_cache = None
    states = teacher = SimpleNamespace(offloads=False, load=None, offload=None)
    memory: Any = DeviceMemory(engine, teacher, None, states)  # type: ignore[arg-type]
    memory.for_rollout()
    counted = 60  # vLLM's 50, awake, and 10
    memory.for_student()
    counted, asleep = 70, 50
    assert memory.peak_gib() == 60
    counted = 120
    assert memory.peak_gib() == 70
    memory.for_refit()
    counted = 10
    assert memory.peak_gib() == 70


def test_the_peak_of_a_refit_leaves_out_what_went_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's 60 leave before vLLM's 30 wake: they are never there together."""
    now, highest, asleep = 60 + 30, 60 + 30, 30

    def reset() -> None:
        nonlocal highest
        highest = now

    def states_off() -> None:
        nonlocal now
        now -= 50

    def wake_up() -> None:
        nonlocal asleep
        asleep = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: highest * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(parallel, "device", lambda: None)
    monkeypatch.setattr(DeviceMemory, "_move", lambda _, what, move: move())
    engine = SimpleNamespace(sleeping_bytes=lambda: asleep * 2**30, wake_up_weights=wake_up)
    states = SimpleNamespace(offloads=False, offload=states_off)
    memory: Any = DeviceMemory(engine, None, None, states)  # type: ignore[arg-type]
    memory.for_refit()
    assert memory.peak_gib() == 60


def on_all_ranks(tensors: list[torch.Tensor]) -> int:
    """Their elements together: the distributed optimizer has a part of them on each rank."""
    count = torch.tensor(sum(tensor.numel() for tensor in tensors))
    dist.all_reduce(count)
    return int(count)


def list_states(path: str) -> None:
    """Every state once, nothing that is the model's own."""
    for dtype, each in (("bfloat16", 3), ("float32", 2)):
        sections = {"model": {"path": path, "dtype": dtype}, "data": {"path": "unused"}}
        config = Config.model_validate(sections)
        layout = parallel.initialize(config.parallel, seed=1)
        arch = read_architecture(path)
        teacher, student = (build_model(arch, config.model, config.parallel, layout.pg_collection) for _ in range(2))
        learner = Student(student, layout, config, arch.vocab_size, divergence(config))
        optimizer = build_optimizer(learner, config.optim)
        states = OptimizerStates(optimizer, config.optim)
        parameters = list(student.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        assert on_all_ranks(states._tensors()) == (count if dtype == "bfloat16" else 0)
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        assert all(len(part.optimizer.state) == 0 for part in parts)  # a checkpoint could still be loaded
        batch, dp = Batch(random_samples(8), Weighting(skip=1)), layout.dp_group
        microbatches = split(batch, batch.assign(2, dp.size()), dp.rank(), torch.device("cpu"))
        frozen = FrozenTeacher(teacher, "resident")
        losses = learner.forward_backward(microbatches, frozen.head_weight(), frozen.score(microbatches))
        optimizer_step(optimizer, build_schedule(optimizer, config.optim, steps=3), losses.means()["loss"])
        tensors = states._tensors()
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert len(places) == len(tensors)
        assert places.isdisjoint(parameter.untyped_storage().data_ptr() for parameter in parameters)
        assert on_all_ranks(tensors) == each * count
        assert all(tensor.dtype == torch.float32 for tensor in tensors)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_states_are_all_there_is(ranks: int, tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3", tied=True, vocab_size=512)
    run_distributed(list_states, ranks, str(path))
