"""What checkpoints ask for: the host memory of a real save, disk, speed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opsd.config import CheckpointConfig, Config, ParallelConfig
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import build_model
from megatron_opsd.model.optimizer import build_optimizer
from megatron_opsd.model.student import Student
from megatron_opsd.plan.formulas import GIB
from megatron_opsd.plan.planner import Cluster, make_plan
from megatron_opsd.plan.storage import SaveMemory, most_checkpoints, save_memory, write_speed
from megatron_opsd.reliability import checkpoint
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.types import Progress
from megatron_opsd.weights.architecture import read_architecture

from ..distributed.harness import run_distributed
from ..distributed.tiny import write_model


def config_of(**sections: object) -> Config:
    return Config.model_validate({"model": {"path": "Qwen3-32B"}, "data": {"path": "unread"}} | sections)


@pytest.mark.parametrize(
    ("expected", "checkpoints", "interval"),
    [
        (3, {"save_interval": 20}, 0),  # two, and the one that is written
        (5, {"save_interval": 20, "keep_last": 0}, 0),
        (6, {"save_interval": 18, "keep_last": 0}, 0),  # the last step is saved too
        (4, {"save_interval": 20}, 10),  # the best one
        (5, {"save_interval": 10, "keep_every": 30}, 0),  # 30, 60, 80 and 90 when 100 is written
        (1, {"save_interval": 200}, 0),
        (0, {"save_interval": 0}, 0),
    ],
)
def test_checkpoints_on_disk(expected: int, checkpoints: dict, interval: int) -> None:
    evaluate = {"interval": interval, "data": {"path": "unread"}}
    assert most_checkpoints(config_of(checkpoint=checkpoints, evaluate=evaluate)) == expected


def test_the_signals_lead_asks_for_a_speed() -> None:
    config = config_of(checkpoint={"signal_lead_seconds": 600})
    assert write_speed(config, 400 * GIB) == GIB


def test_host_memory_is_that_of_the_nodes_with_writing_ranks() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=2, sequence_parallel=True)
    n = 1000  # a rank's elements
    found = save_memory(layout, 8, [(n, 0)] * 2, ranks_of_a_stage=16, written=14, distributed=True)
    assert found == SaveMemory(nodes=2, peak=8 * 30 * n, writing=8 * 14 * n, elsewhere=8 * 6 * n)
    whole = save_memory(layout, 8, [(n, 0)] * 2, ranks_of_a_stage=16, written=14, distributed=False)
    assert whole == SaveMemory(nodes=2, peak=8 * 14 * n, writing=8 * 14 * n, elsewhere=0)
    experts = ParallelConfig(expert_model_parallel_size=8)
    found = save_memory(experts, 4, [(0, n)], ranks_of_a_stage=16, written=14, distributed=True)
    assert found == SaveMemory(nodes=2, peak=4 * 30 * n, writing=4 * 14 * n, elsewhere=4 * 6 * n)


def test_host_memory_of_a_plan() -> None:
    layout = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    plan = make_plan(config_of(parallel=layout), Cluster(4, 8, 79))
    stage = plan.stages[1].parameters  # with the last norm
    assert plan.save_memory == SaveMemory(nodes=2, peak=8 * 30 * stage, writing=8 * 14 * stage, elsewhere=8 * 6 * stage)
    assert plan.disk == 2 * plan.checkpoint + plan.hf_export
    (resident, offloaded) = (
        make_plan(config_of(parallel=layout, optim={"placement": placement}), Cluster(4, 8, 79)).pinned_host_memory
        for placement in ("resident", "offload")
    )
    assert (resident, offloaded) == (0, 8 * plan.stages[1].phases["optimizer"]["optimizer states"])


# A real save of a mixture of experts on four ranks. 25 million elements of experts on each rank outweigh the rest.


def test_host_memory_of_a_real_save(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "qwen3_moe", tied=False)
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}
    config = config_of(model={"path": str(path)}, parallel=layout)
    run_distributed(_save_on_four_ranks, 4, config, tmp_path / "run")


def _save_on_four_ranks(config: Config, out: Path) -> None:
    layout = parallel.initialize(config.parallel, 0)
    arch = read_architecture(config.model.path)
    assert arch.moe
    arch = replace(arch, hidden_size=512, moe=replace(arch.moe, moe_ffn_hidden_size=1024))
    model = build_model(arch, config.model, config.parallel, layout.pg_collection)
    student = Student(model, layout, config, arch.vocab_size, divergence(config))
    optimizer = build_optimizer(student, config.optim)
    student.ddp_chunks[0].zero_grad_buffer()
    optimizer.step()
    experts = sum(p.numel() for p in model.parameters() if not getattr(p, "allreduce", True))
    dense = sum(p.numel() for p in model.parameters()) - experts
    run_dir = RunDir(out)
    if layout.rank == 0:
        run_dir.prepare()
    torch.distributed.barrier()
    saves = checkpoint.Checkpoints(run_dir, CheckpointConfig())
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    saves.save(model, optimizer, None, Progress(teacher="", sampler={}, step=1), None)
    peak, writing = memory("VmHWM") - before, memory("VmRSS") - before
    saves.finish()
    planned = save_memory(config.parallel, 1, [(dense, experts)], 4, written=14, distributed=True)  # nodes of one rank
    if layout.rank < 2:
        assert peak == pytest.approx(planned.peak, rel=0.08)
        assert writing == pytest.approx(planned.writing, rel=0.15)
    else:
        assert peak == pytest.approx(planned.elsewhere, rel=0.15)


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
