"""An ema teacher is the float64 average of its students, in bfloat16 too; a live teacher is no copy."""

from pathlib import Path

import torch

from megatron_opsd.config import Config
from megatron_opsd.data.batch import Batch, split
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import ModelChunks, build_model
from megatron_opsd.model.optimizer import build_optimizer, build_schedule, optimizer_step
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import EmaTeacher, LiveTeacher
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable

from .harness import run_distributed
from .tiny import random_samples, write_model

STEPS, DECAY = 20, 0.999


def steps_of_a_student(path: str, tp: int, dtype: str) -> None:
    config = Config.model_validate(
        {
            "model": {"path": path, "dtype": dtype},
            "data": {"path": "unused"},
            "parallel": {"tensor_model_parallel_size": tp},
            "optim": {"lr": 1e-4, "warmup_steps": 0},
        }
    )
    layout = parallel.initialize(config.parallel, seed=1)
    arch = read_architecture(path)

    def build(dtype: str = dtype) -> ModelChunks:
        settings = config.model.model_copy(update={"dtype": dtype})
        model = build_model(arch, settings, config.parallel, layout.pg_collection)
        load_hf(model, HFReader(path), NameTable(arch), layout.shard, layout.dp_group)
        return model

    student = Student(build(), layout, config, arch.vocab_size, divergence(config))
    optimizer = build_optimizer(student, config.optim)
    schedule = build_schedule(optimizer, config.optim, STEPS)
    teacher = EmaTeacher(build(), "resident", DECAY, lambda: build("float32"))
    batch = Batch(random_samples(4))
    microbatches = split(batch, batch.assign(2, layout.dp_group.size()), layout.dp_group.rank(), torch.device("cpu"))
    exact = {name: weight.detach().double() for name, weight in student.model_chunks.named_parameters()}
    start = {name: weight.clone() for name, weight in exact.items()}
    for _ in range(STEPS):
        losses = student.forward_backward(microbatches, teacher.head_weight(), teacher.score(microbatches))
        assert optimizer_step(optimizer, schedule, losses.means()["loss"]).applied
        teacher.after_update(student.model_chunks)
        for name, weight in student.model_chunks.named_parameters():
            exact[name] += (1 - DECAY) * (weight.detach().double() - exact[name])
    average = dict(teacher.average().named_parameters())
    scoring = dict(teacher.model_chunks.named_parameters())
    for name, wanted in exact.items():
        moved = (wanted - start[name]).norm()
        assert (average[name].double() - wanted).norm() <= 1e-6 * wanted.norm(), name
        assert ((average[name].double() - start[name]) - (wanted - start[name])).norm() <= 0.02 * moved, name
        assert torch.equal(scoring[name], average[name].to(scoring[name].dtype)), name
    assert sum((exact[name] != start[name]).any().item() for name in exact) > len(exact) / 2

    live = LiveTeacher(student.model_chunks)
    assert live.average() is None
    assert all(a is b for a, b in zip(live.model_chunks.parameters(), student.model_chunks.parameters(), strict=True))
    (hidden, *_) = live.score(microbatches)
    losses = student.forward_backward(microbatches, live.head_weight(), live.score(microbatches))
    assert not hidden.requires_grad
    assert student.model_chunks.last.training
    assert losses.means()["divergence"] > 0  # the prompts differ


def worker(path: str) -> None:
    for dtype in ("float32", "bfloat16"):
        for tp in (2, 1):
            steps_of_a_student(path, tp, dtype)


def test_the_average_is_exact(tmp_path: Path) -> None:
    """TP2 and DP2."""
    run_distributed(worker, 2, str(write_model(tmp_path / "model", "qwen3", tied=False)))
