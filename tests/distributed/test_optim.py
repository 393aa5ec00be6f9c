"""The weights of a bfloat16 model follow their float32 parameters from the first small step on, in every layout."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.config import Config
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import build_model
from megatron_opsd.model.optimizer import build_optimizer, dithered
from megatron_opsd.model.student import Student
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable

from .harness import run_distributed
from .tiny import write_model

LR = 1e-5


def test_dither_leaves_the_weights_and_is_even() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(1_000_000, generator=generator)).bfloat16()
    weight[:1000], weight[1000:2000] = 0.0, 2.0**-6  # a power of two has a narrower neighbour below
    spread = dithered(weight, generator)
    assert torch.equal(spread.bfloat16(), weight)
    for step in (1e-7, 1e-6, 1e-5):
        moved = (spread + step).bfloat16().float() - weight.float()
        assert float(moved.mean()) == pytest.approx(step, rel=0.1)
        assert float(((weight.float() + step).bfloat16().float() - weight.float()).mean()) < 0.3 * step


def first_step(student: Student, config: Config, gradient: float) -> list[Tensor]:
    """What Adam's first step adds to each weight, where every gradient has one value."""
    before = [weight.detach().clone() for weight in student.model_chunks.parameters()]
    optimizer = build_optimizer(student, config.optim)
    student.ddp_chunks[0].zero_grad_buffer()
    for weight in student.model_chunks.parameters():
        weight.main_grad.fill_(gradient)  # type: ignore[attr-defined]
    optimizer.prepare_grads()
    optimizer.step()
    return [now.detach() - old for now, old in zip(student.model_chunks.parameters(), before, strict=True)]


def follow(path: str) -> None:
    for tp, pp, distributed in [(1, 1, False), (2, 1, False), (1, 1, True), (2, 1, True), (1, 2, True)]:
        config = Config.model_validate(
            {
                "model": {"path": path, "dtype": "bfloat16"},
                "data": {"path": "unused"},
                "parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
                "optim": {"lr": LR, "adam_eps": 1e-12, "clip_grad": 0.0, "use_distributed_optimizer": distributed},
            }
        )
        layout = parallel.initialize(config.parallel, seed=1)
        arch = read_architecture(path)
        model = build_model(arch, config.model, config.parallel, layout.pg_collection)
        load_hf(model, HFReader(path), NameTable(arch), layout.shard)
        student = Student(model, layout, config, arch.vocab_size, divergence(config))
        # Any mistake in which numbers belong to which weight would show as a change.
        assert all(not change.any() for change in first_step(student, config, gradient=0.0))
        # Rows of the embedding that only pad the vocabulary are zero and follow exactly.
        moved = torch.cat([change.flatten() for change in first_step(student, config, gradient=1.0)])
        assert float(moved.float().mean()) == pytest.approx(-LR, rel=0.1), (tp, pp, distributed)
        shared = [weight for name, weight in model.named_parameters() if "norm" in name or tp == 1]
        if pp == 2:  # the head is the embedding
            shared = [model.last.shared_embedding_or_output_weight()]
        for weight in shared:
            copies = [torch.empty_like(weight) for _ in range(layout.world_size)]
            dist.all_gather(copies, weight.detach())
            assert torch.equal(copies[0], copies[1]), (tp, pp, distributed)


def test_small_steps_reach_a_bfloat16_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "qwen3", tied=True)
    run_distributed(follow, 2, str(path))
