"""Every layout computes the same model, the same gradients and the same Hugging Face files as one process does."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_opsd.config import CheckpointConfig, Config, ObjectiveConfig, OptimConfig, ParallelConfig, TrainConfig
from megatron_opsd.convert.blocks import whole_model
from megatron_opsd.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_opsd.convert.dist_files import DistReader
from megatron_opsd.data.batch import Batch, Microbatch, Sample, Sequences, fill_up, split
from megatron_opsd.data.weighting import Weighting
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import ModelChunks, build_model
from megatron_opsd.model.optimizer import build_optimizer, build_schedule, optimizer_step
from megatron_opsd.model.parallel import Layout
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import FrozenTeacher
from megatron_opsd.objective import SampledToken
from megatron_opsd.reliability import checkpoint
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.types import Progress
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import Exporter, checksum
from megatron_opsd.weights.hf_files import HFReader, write_hf
from megatron_opsd.weights.load import global_parameters, load_hf
from megatron_opsd.weights.mapping import NameTable

from .harness import run_distributed
from .tiny import random_samples, write_model

BATCH = 8


@dataclass(frozen=True)
class Case:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 2
    packing: bool = False
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
                    expert_model_parallel_size=self.ep,
                    sequence_parallel=self.sequence_parallel,
                ),
                "objective": ObjectiveConfig(normalization=self.normalization, chunk_size=7),
                "train": TrainConfig(micro_batch_size=self.micro_batch_size, global_batch_size=BATCH),
                # A large eps: else Adam's first step is the sign of each gradient, noise where that is nearly zero.
                "optim": OptimConfig(lr=1e-2, adam_eps=1e-2, use_distributed_optimizer=self.distributed_optimizer),
            }
        )


# Models: Qwen3 with and without a head of its own, Qwen2, Qwen3-MoE likewise; 1, 2, 4 and 8 query heads a group, layers
# that two stages do not share evenly, expert weights that sum to 1 and that do not.
MODELS: dict[str, dict] = {
    "qwen3-tied": {},
    "qwen3-untied": {"num_attention_heads": 8, "num_hidden_layers": 5},
    "qwen2-tied": {"num_attention_heads": 16, "num_hidden_layers": 3},
    "qwen3_moe-untied": {"num_key_value_heads": 4},
    "qwen3_moe-tied": {"num_hidden_layers": 3, "norm_topk_prob": False},
}
QWEN3 = {
    1: [Case(), Case(micro_batch_size=4), Case(normalization="sequence"), Case(recompute="full"), Case(packing=True)],
    2: [
        Case(tp=2),
        Case(tp=2, normalization="sequence"),
        Case(tp=2, sequence_parallel=True),
        Case(tp=2, sequence_parallel=True, recompute="full", micro_batch_size=4),
        Case(pp=2),
        Case(pp=2, normalization="sequence", micro_batch_size=4),
        Case(packing=True, normalization="sequence"),
        Case(),  # two data-parallel ranks
        Case(normalization="sequence", micro_batch_size=4),
        Case(distributed_optimizer=True),
    ],
    4: [
        Case(tp=2, pp=2),
        Case(tp=2, pp=2, sequence_parallel=True, normalization="sequence"),
        Case(tp=2, pp=2, sequence_parallel=True, packing=True, recompute="full"),
        Case(tp=2, sequence_parallel=True),  # times two data-parallel ranks
        Case(pp=2),
        Case(pp=2, distributed_optimizer=True),
    ],
}
CASES = {
    "qwen3-tied": QWEN3,
    "qwen3-untied": QWEN3,
    "qwen2-tied": {
        1: [Case()],
        2: [Case(tp=2), Case(tp=2, sequence_parallel=True), Case(pp=2)],
        4: [Case(tp=2, pp=2, sequence_parallel=True)],
    },
    "qwen3_moe-untied": {
        1: [Case(), Case(recompute="full", micro_batch_size=4)],
        2: [
            Case(ep=2),
            Case(tp=2, sequence_parallel=True),  # each rank has all experts and half of the tokens
            Case(tp=2, ep=2, sequence_parallel=True),
            Case(pp=2),
        ],
        4: [
            Case(tp=2, ep=2, sequence_parallel=True),
            Case(tp=2, ep=4, sequence_parallel=True),
            Case(pp=2, ep=2, recompute="full"),
            Case(ep=2, packing=True, micro_batch_size=1),
        ],
    },
    "qwen3_moe-tied": {
        1: [Case()],
        2: [Case(tp=2, ep=2, sequence_parallel=True), Case(pp=2)],
        4: [Case(tp=2, pp=2, ep=2, sequence_parallel=True)],
    },
}
# Layouts that pass a checkpoint on, each to the next.
RELAY = {
    1: [Case(distributed_optimizer=True)],
    2: [Case(ep=2, distributed_optimizer=True), Case(tp=2, sequence_parallel=True, distributed_optimizer=True)],
    4: [Case(tp=2, pp=2, ep=2, sequence_parallel=True, distributed_optimizer=True)],
}
RELAY_MODEL = "qwen3_moe-untied"


def build(config: Config, layout: Layout) -> ModelChunks:
    arch = read_architecture(config.model.path)
    model = build_model(arch, config.model, config.parallel, layout.pg_collection)
    reader = HFReader(config.model.path)
    if layout.dp_group.rank() > 0 and layout.expert_dp_group.rank() > 0:
        reader = None  # the first of its replicas sends everything
    load_hf(model, reader, NameTable(arch), layout.shard, layout.dp_group, layout.expert_dp_group)  # type: ignore[arg-type]
    return model


def exporter(model: ModelChunks, path: str, layout: Layout, bucket_bytes: int) -> Exporter:
    table = NameTable(read_architecture(path))
    return Exporter(model, table, layout.tp_group, layout.pp_group, layout.ep_group, bucket_bytes)


def check_conversion(model: ModelChunks, path: str, layout: Layout, out: Path) -> None:
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


def check_loading(model: ModelChunks, folder: Path) -> None:
    """Megatron itself loads a converted checkpoint into any layout, the vocabulary's padding as zeros."""
    state = dist_checkpointing.load(model.first.sharded_state_dict(), str(folder))
    assert isinstance(state, dict)
    for name, parameter in model.first.named_parameters():
        assert torch.equal(state[name], parameter), name


def check_reading(folder: Path, path: str, saved: dict[str, torch.Tensor]) -> None:
    """A training checkpoint of any layout holds these weights, block by block."""
    blocks, reader = list(whole_model(NameTable(read_architecture(path)))), DistReader(folder)
    reader.check(blocks)
    for block in blocks:
        for name, part in zip(block.rule.hf, block.rule.split(reader.read(block)), strict=True):
            assert torch.equal(part, saved[f"{name} after the step"][block.start : block.stop]), name


def check_logits(
    teacher: FrozenTeacher, teacher_hidden: list[torch.Tensor], microbatches: list, path: str, layout: Layout
) -> None:
    """Logits at the response positions equal transformers' within 1e-5."""
    if not layout.is_last_stage:
        assert teacher_hidden == []
        return
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocab = reference.config.vocab_size
    for microbatch, hidden in zip(microbatches, teacher_hidden, strict=True):
        local = (hidden @ teacher.head_weight().T).contiguous()  # [n, v/tp]
        shards = [torch.empty_like(local) for _ in range(layout.tp_group.size())]
        dist.all_gather(shards, local, group=layout.tp_group)
        with torch.no_grad():
            want = logits_by(reference, microbatch.teacher)[microbatch.teacher.index]
        torch.testing.assert_close(torch.cat(shards, 1)[:, :vocab], want, rtol=0, atol=1e-5)


def logits_by(reference: Any, sequences: Sequences) -> torch.Tensor:
    """Logits of every position, [s*b, v]; packed sequences are read one by one."""
    if sequences.boundaries is None:
        return reference(sequences.tokens).logits.transpose(0, 1).flatten(0, 1)
    parts = sequences.tokens[0].split(sequences.boundaries.diff().tolist())
    return torch.cat([reference(part[None]).logits[0] for part in parts if len(part)])


def gradients(student: Student, path: str, layout: Layout) -> dict[str, torch.Tensor]:
    """The gradients before clipping as whole tensors under their Hugging Face names."""
    grads = {name: parameter.main_grad for name, parameter in global_parameters(student.model_chunks)}
    export = exporter(student.model_chunks, path, layout, 2**30)
    export._parameters = grads  # the exporter gathers whatever it is given
    return dict(export)


@dataclass
class Run:
    """Student, teacher and optimizer of one layout, and a batch that is the same for every layout."""

    case: Case
    path: str
    layout: Layout

    def __post_init__(self) -> None:
        config = self.case.config(self.path)
        self.teacher = FrozenTeacher(build(config, self.layout), "resident")
        vocab_size = read_architecture(self.path).vocab_size
        self.student = Student(build(config, self.layout), self.layout, config, vocab_size, divergence(config))
        self.optimizer = build_optimizer(self.student, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, steps=10)
        self.microbatches = self.split(random_samples(BATCH))
        self.teacher_hidden = self.teacher.score(self.microbatches)

    def split(self, samples: list[Sample]) -> list[Microbatch]:
        weighting = Weighting(self.case.normalization, skip=1)
        batch = Batch(samples, weighting, multiple=self.case.tp, one_length=self.case.pp > 1, packing=self.case.packing)
        dp = self.layout.dp_group
        assignment = batch.assign(self.case.micro_batch_size, dp.size())
        return split(batch, assignment, dp.rank(), parallel.device())

    def other_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the sampled tokens' losses, and of the divergence of a batch with fill in it."""
        if self.case.distributed_optimizer:
            return {}
        own, found = self.student.token_loss, {}
        for advantage, cap in (("given", None), ("teacher", 1.5)):
            self.student.token_loss = SampledToken(1.3, advantage, cap)
            found |= self._gradients(self.microbatches, self.teacher_hidden, f" of {advantage} advantages")
        self.student.token_loss = own
        filled = self.split(fill_up(random_samples(BATCH), 2 * BATCH))
        return found | self._gradients(filled, self.teacher.score(filled), "")

    def _gradients(
        self, microbatches: list[Microbatch], hidden: list[torch.Tensor], what: str
    ) -> dict[str, torch.Tensor]:
        self.student.forward_backward(microbatches, self.teacher.head_weight(), hidden)
        grads = gradients(self.student, self.path, self.layout)
        return {name + what: grad.clone() for name, grad in grads.items()}

    def step(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Gradients as whole tensors (none where the optimizer shards them), and all logged numbers."""
        head = self.teacher.head_weight()
        losses = self.student.forward_backward(self.microbatches, head, self.teacher_hidden)
        grads = {} if self.case.distributed_optimizer else gradients(self.student, self.path, self.layout)
        grads = {name: grad.clone() for name, grad in grads.items()}
        grad_norm, _, updated = optimizer_step(self.optimizer, self.schedule, losses.means()["loss"])
        assert updated
        return grads, losses.means() | {"grad_norm": grad_norm, "tokens": losses.tokens, "count": losses.count}

    def weights(self) -> dict[str, torch.Tensor]:
        stream = exporter(self.student.model_chunks, self.path, self.layout, 2**30)
        return {f"{name} after the step": tensor.clone() for name, tensor in stream}


def compute(case: Case, path: str, layout: Layout, tmp: str) -> None:
    """One step: logits, gradients, updated weights and numbers."""
    run = Run(case, path, layout)
    check_logits(run.teacher, run.teacher_hidden, run.microbatches, path, layout)
    others = run.other_gradients()
    grads, numbers = run.step()
    for name, grad in grads.items():  # fill changes no gradient
        assert (others[name] - grad).norm() <= 1e-5 * grad.norm(), name
    tensors = grads | run.weights() | {name: grad for name, grad in others.items() if name not in grads}
    reference = Path(tmp) / f"{Path(path).name}_{case.normalization}"
    if layout.world_size == 1 and replace(case, normalization="token") == Case():
        save_file(tensors, reference)
        torch.save(numbers, f"{reference}.pt")
    compare(tensors, numbers, reference, case)


def relay(case: Case, path: str, layout: Layout, tmp: str) -> None:
    """Take the checkpoint of the layout before, write it again, and go on from it as the first layout did."""
    run, run_dir = Run(case, path, layout), Path(tmp) / "relay"
    checkpoints = checkpoint.Checkpoints(RunDir(run_dir), CheckpointConfig())
    saved = run_dir / "checkpoints" / "step_000001"
    model, optimizer, reference = run.student.model_chunks, run.optimizer, run_dir / "second_step"
    if layout.world_size == 1:
        run.step()
        run_dir.mkdir(exist_ok=True)
        save_file(run.weights(), run_dir / "first_step")
    else:
        assert checkpoint.find(RunDir(run_dir), "auto") == saved
        checkpoint.load(saved, model, optimizer, None)
        run.schedule.step(1)
        before = load_file(run_dir / "first_step")
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
    checkpoints.save(model, optimizer, None, Progress("a teacher", {}, step=1), keep=None)
    _, numbers = run.step()  # while the checkpoint is being written
    checkpoints.finish()
    check_reading(saved, path, load_file(run_dir / "first_step"))
    if layout.world_size == 1:
        save_file(run.weights(), reference)
        torch.save(numbers, f"{reference}.pt")
    compare(run.weights(), numbers, reference, case)


def worker(paths: list[str], tmp: str) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    for path in paths:
        for i, case in enumerate(CASES[Path(path).name][world_size]):
            layout = parallel.initialize(case.config(path).parallel, seed=1)
            if i == 0:
                check_conversion(build(case.config(path), layout), path, layout, Path(tmp) / "exported")
                converted = Path(tmp) / f"{Path(path).name}_by_{world_size}"
                hf_to_megatron(Path(path), converted, dtype=None, verify=True)
                megatron_to_hf(converted, converted.with_suffix(".hf"), verify=True)
            check_loading(build(case.config(path), layout), converted)
            compute(case, path, layout, tmp)
        if Path(path).name == RELAY_MODEL:
            for case in RELAY[world_size]:
                relay(case, path, parallel.initialize(case.config(path).parallel, seed=1), tmp)


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
    paths = [
        str(write_model(tmp / name, name.split("-")[0], tied=name.endswith("-tied"), **shape))
        for name, shape in MODELS.items()
    ]
    run_distributed(worker, 1, paths, str(tmp), timeout=480)
    return paths, str(tmp)


# In turn: each takes the checkpoint that the one before has written.
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_equals_one_process(checkpoints: tuple[list[str], str], world_size: int) -> None:
    run_distributed(worker, world_size, *checkpoints, timeout=480)
