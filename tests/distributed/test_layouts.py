"""Every layout computes the same model, the same gradients and the same Hugging Face files as one process does."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_opsd import parallel
from megatron_opsd.batch import build_batch, split
from megatron_opsd.config import Config, ObjectiveConfig, OptimConfig, ParallelConfig, TrainConfig
from megatron_opsd.conversion.architecture import read_architecture
from megatron_opsd.conversion.export import Exporter, checksum
from megatron_opsd.conversion.hf_files import HFReader, write_hf
from megatron_opsd.conversion.load import global_parameters, load_hf
from megatron_opsd.conversion.mapping import NameTable
from megatron_opsd.model import HiddenStateGPT, build_model
from megatron_opsd.optim import build_optimizer, build_schedule, optimizer_step
from megatron_opsd.parallel import Layout
from megatron_opsd.student import Student
from megatron_opsd.teacher import Teacher

from .harness import run_distributed
from .tiny import random_samples, write_qwen3

BATCH = 8


@dataclass(frozen=True)
class Case:
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 2
    normalization: str = "token"
    recompute: str = "none"
    distributed_optimizer: bool = False

    def config(self, path: str) -> Config:
        base = Config.model_validate({"model": {"path": path, "dtype": "float32"}, "data": {"path": "unused"}})
        return base.model_copy(
            update={
                "model": base.model.model_copy(update={"recompute": self.recompute}),
                "parallel": ParallelConfig(
                    tensor_model_parallel_size=self.tp,
                    pipeline_model_parallel_size=self.pp,
                    sequence_parallel=self.sequence_parallel,
                ),
                "objective": ObjectiveConfig(normalization=self.normalization, chunk_size=7),
                "train": TrainConfig(micro_batch_size=self.micro_batch_size, global_batch_size=BATCH),
                "optim": OptimConfig(lr=1e-2, use_distributed_optimizer=self.distributed_optimizer),
            }
        )


ONE = [Case(), Case(micro_batch_size=4), Case(normalization="sequence"), Case(recompute="full")]
TWO = [
    Case(tp=2),
    Case(tp=2, normalization="sequence"),
    Case(tp=2, sequence_parallel=True),
    Case(tp=2, sequence_parallel=True, recompute="full", micro_batch_size=4),
    Case(pp=2),
    Case(pp=2, normalization="sequence", micro_batch_size=4),
    Case(),  # two data-parallel ranks
    Case(normalization="sequence", micro_batch_size=4),
    Case(distributed_optimizer=True),
]
FOUR = [
    Case(tp=2, pp=2),
    Case(tp=2, pp=2, sequence_parallel=True, normalization="sequence"),
    Case(tp=2, sequence_parallel=True),  # times two data-parallel ranks
    Case(pp=2),
    Case(pp=2, distributed_optimizer=True),
]


def build(config: Config, layout: Layout) -> HiddenStateGPT:
    arch = read_architecture(config.model.path)
    model = build_model(arch, config.model, config.parallel, layout.pg_collection)
    reader = HFReader(config.model.path)
    load_hf(model, reader, NameTable(arch), layout.tp_group.rank(), layout.tp_group.size())
    return model


def exporter(model: HiddenStateGPT, path: str, layout: Layout, bucket_bytes: int) -> Exporter:
    return Exporter(model, NameTable(read_architecture(path)), layout.tp_group, layout.pp_group, bucket_bytes)


def check_conversion(model: HiddenStateGPT, path: str, layout: Layout, out: Path) -> None:
    """Bit-exact round trip, checksums that hold for any layout, and a directory transformers loads."""
    reader = HFReader(path)
    for bucket_bytes in (1, 30_000, 2**30):  # a tensor, less than a layer, everything
        export = exporter(model, path, layout, bucket_bytes)
        checksums = export.checksums()
        streamed = dict(export)
        assert streamed.keys() == checksums.keys() == export.table.hf_tensors().keys()
        for name, tensor in streamed.items():
            whole = reader.read(name)
            assert torch.equal(tensor, whole), name
            assert int(checksum(whole)) == checksums[name], name
    if layout.rank == 0:
        write_hf(streamed.items(), Path(path), out, torch.float32)
        written = load_file(out / "model.safetensors")
        assert all(torch.equal(written[name], reader.read(name)) for name in streamed)


def check_logits(teacher: Teacher, targets: list[torch.Tensor], microbatches: list, path: str, layout: Layout) -> None:
    """Logits at the response positions equal transformers' within 1e-5."""
    if not layout.is_last_stage:
        assert targets == []
        return
    from transformers import Qwen3ForCausalLM

    reference = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocab = reference.config.vocab_size
    for microbatch, hidden in zip(microbatches, targets, strict=True):
        local = (hidden @ teacher.head_weight().T).contiguous()  # [n, v/tp]
        shards = [torch.empty_like(local) for _ in range(layout.tp_group.size())]
        dist.all_gather(shards, local, group=layout.tp_group)
        with torch.no_grad():
            want = reference(microbatch.teacher_tokens).logits.transpose(0, 1).flatten(0, 1)[microbatch.teacher_index]
        torch.testing.assert_close(torch.cat(shards, 1)[:, :vocab], want, rtol=0, atol=1e-5)


def gradients(student: Student, path: str, layout: Layout) -> dict[str, torch.Tensor]:
    """The gradients before clipping as whole tensors under their Hugging Face names."""
    grads = {name: parameter.main_grad for name, parameter in global_parameters(student.model)}
    export = exporter(student.model, path, layout, 2**30)
    export._parameters = grads  # the exporter gathers whatever it is given
    return dict(export)


def run_case(case: Case, path: str, layout: Layout) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """One step: gradients and updated weights as whole tensors (with a sharded optimizer the weights only), numbers."""
    config = case.config(path)
    teacher = Teacher(build(config, layout), "resident")
    student = Student(build(config, layout), layout, config, read_architecture(path).vocab_size)
    optimizer = build_optimizer(student, config.optim)
    batch = build_batch(random_samples(BATCH), skip_first_tokens=1, multiple=case.tp, one_length=case.pp > 1)
    microbatches = split(
        batch, case.micro_batch_size, layout.dp_group, config.objective.normalization, parallel.device()
    )
    targets = teacher.score(batch, microbatches)
    check_logits(teacher, targets, microbatches, path, layout)
    losses = student.forward_backward(batch, microbatches, teacher.head_weight(), targets)
    grads = {} if case.distributed_optimizer else gradients(student, path, layout)
    grads = {name: grad.clone() for name, grad in grads.items()}
    grad_norm, _ = optimizer_step(optimizer, build_schedule(optimizer, config.optim, steps=10))
    numbers = losses.means() | {"grad_norm": grad_norm, "tokens": losses.tokens, "count": losses.count}
    weights = {f"{name} after the step": tensor for name, tensor in exporter(student.model, path, layout, 2**30)}
    return grads | weights, numbers


def worker(cases: list[Case], paths: list[str], tmp: str) -> None:
    for path in paths:
        for i, case in enumerate(cases):
            layout = parallel.initialize(case.config(path).parallel, seed=1)
            if i == 0:
                model = build(case.config(path), layout)
                check_conversion(model, path, layout, Path(tmp) / "exported")
            tensors, numbers = run_case(case, path, layout)
            reference = Path(tmp) / f"{Path(path).name}_{case.normalization}"
            if layout.world_size == 1 and replace(case, normalization="token") == Case():
                save_file(tensors, reference)
                torch.save(numbers, f"{reference}.pt")
            compare(tensors, numbers, reference, case)


def compare(tensors: dict[str, torch.Tensor], numbers: dict[str, float], reference: Path, case: Case) -> None:
    """Relative L2 difference of each tensor to the single process's, and all logged numbers."""
    wanted_tensors = load_file(reference)
    for name, tensor in tensors.items():
        error = ((tensor - wanted_tensors[name]).norm() / wanted_tensors[name].norm()).item()
        assert error < 1e-5, f"{case}: {name} differs by {error:.1e}"
    wanted = torch.load(f"{reference}.pt")
    for name, value in numbers.items():
        assert value == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), f"{case}: {name}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    tmp = tmp_path_factory.mktemp("layouts")
    paths = [str(write_qwen3(tmp / name, tied=name == "tied")) for name in ("tied", "untied")]
    run_distributed(worker, 1, ONE, paths, str(tmp))
    return paths, str(tmp)


@pytest.mark.parametrize(("world_size", "cases"), [(2, TWO), (4, FOUR)])
def test_every_layout_equals_one_process(
    checkpoints: tuple[list[str], str], world_size: int, cases: list[Case]
) -> None:
    run_distributed(worker, world_size, cases, *checkpoints)
