"""What leaves the GPU comes back as it was, its memory is free meanwhile, and vLLM wakes to the same answers."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from megatron_opsd import events
from megatron_opsd.config import Config
from megatron_opsd.config_file import load_config
from megatron_opsd.data.batch import Batch, split
from megatron_opsd.data.datasets import read_examples
from megatron_opsd.data.prompts import build_prompts
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import ModelChunks, build_model
from megatron_opsd.model.optimizer import OptimizerStates, build_optimizer, build_schedule, optimizer_step
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import EmaTeacher, FrozenTeacher
from megatron_opsd.reliability.run_dir import read_jsonl
from megatron_opsd.rollout.engine import Sampling
from megatron_opsd.rollout.refit import refit
from megatron_opsd.telemetry.metrics import Clock
from megatron_opsd.trainer import Trainer
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable
from tests.distributed.command_line import ARITHMETIC, Torchrun, arguments, write_problems
from tests.distributed.harness import run_distributed
from tests.distributed.tiny import random_samples, write_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# 40 million parameters, a third of them the head's: enough that what moves shows beside what allocators keep.
SHAPE = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8] * 20]


class Parts:
    """Student, teacher and optimizer in bfloat16, and a batch."""

    def __init__(self, path: str) -> None:
        sections = {"model": {"path": path}, "data": {"path": "unused"}, "optim": {"placement": "offload", "lr": 1e-3}}
        config = Config.model_validate(sections)
        layout = parallel.initialize(config.parallel, seed=1)
        arch = read_architecture(path)

        def build(dtype: str = "bfloat16") -> ModelChunks:
            settings = config.model.model_copy(update={"dtype": dtype})
            model = build_model(arch, settings, config.parallel, layout.pg_collection)
            load_hf(model, HFReader(path), NameTable(arch), layout.shard)
            return model

        self.build = build
        self.teacher = FrozenTeacher(build(), "offload")
        self.student = Student(build(), layout, config, arch.vocab_size, divergence(config))
        self.optimizer = build_optimizer(self.student, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, steps=10)
        self.states = OptimizerStates(self.optimizer, config.optim)
        batch = Batch(random_samples(8), 1, 1, False, False)
        self.microbatches = split(batch, batch.assign(2, 1), 0, "token", parallel.device())
        self.teacher_hidden = self.teacher.score(self.microbatches)

    def backward(self) -> None:
        losses = self.student.forward_backward(self.microbatches, self.teacher.head_weight(), self.teacher_hidden)
        self.loss = losses.means()["loss"]

    def step(self) -> None:
        self.backward()
        *_, updated = optimizer_step(self.optimizer, self.schedule, self.loss)
        assert updated

    def gradients(self) -> torch.Tensor:
        return torch.cat([parameter.main_grad.flatten() for parameter in self.student.model_chunks.parameters()])


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def move_optimizer_states(path: str) -> None:
    parts = Parts(path)
    parts.states.offload()  # before the first step there are no moments
    parts.states.load()
    for _ in range(2):  # also into host memory that is there already
        parts.step()
        tensors = parts.states._tensors()
        kept, before = [tensor.clone() for tensor in tensors], allocated()
        assert size(tensors) >= 12 * sum(parameter.numel() for parameter in parts.student.model_chunks.parameters())
        parts.states.offload()
        assert all(tensor.is_pinned() for tensor in tensors)
        assert before - allocated() >= size(tensors)
        parts.states.load()
        assert all(now is tensor for now, tensor in zip(parts.states._tensors(), tensors, strict=True))
        assert all(tensor.is_cuda for tensor in tensors)
        assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, kept, strict=True))
    # What the optimizer steps still is what the model is copied from.
    parts.step()
    (part,) = getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])
    for models, copies in zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True):
        for parameter, copy in zip(models, copies, strict=True):
            assert torch.equal(parameter.flatten(), copy.bfloat16())
    assert not all(torch.equal(tensor, was) for tensor, was in zip(tensors, kept, strict=True))


def free_gradients(path: str) -> None:
    parts = Parts(path)
    parts.step()  # the optimizer keeps views of the gradients
    parts.backward()
    wanted, before = parts.gradients(), allocated()
    buffers = [buffer.grad_data for buffer in parts.student.ddp_chunks[0].buffers]
    assert size(buffers) >= wanted.nbytes
    parts.student.ddp_chunks[0].offload_grad_buffers()
    assert before - allocated() >= size(buffers)
    parts.student.ddp_chunks[0].restore_grad_buffers()
    assert torch.count_nonzero(parts.gradients()) == 0
    parts.backward()
    assert (parts.gradients() - wanted).norm() <= 1e-3 * wanted.norm()  # added up in another order
    parts.step()


def move_teacher(path: str) -> None:
    parts = Parts(path)
    head = parts.teacher.head_weight()
    assert head is not None
    others = [parameter for parameter in parts.teacher.model_chunks.parameters() if parameter is not head]
    for _ in range(2):  # also from host memory that is there already
        before = allocated()
        parts.teacher.offload()
        assert head.is_cuda
        assert all(parameter.is_pinned() for parameter in others)
        assert before - allocated() >= size(others)
        parts.teacher.load()
        assert all(parameter.is_cuda for parameter in others)
        scores = parts.teacher.score(parts.microbatches)
        assert all(torch.equal(score, was) for score, was in zip(scores, parts.teacher_hidden, strict=True))


def average_in_host_memory(path: str) -> None:
    """An offloaded ema teacher scores as a resident one does, and only its weights of bfloat16 come to the device."""
    parts = Parts(path)
    placements: list[Literal["resident", "offload"]] = ["resident", "offload"]
    resident, offloaded = (
        EmaTeacher(parts.build(), placement, 0.9, lambda: parts.build("float32")) for placement in placements
    )
    average = offloaded.average()
    assert average is not None
    assert not any(parameter.is_cuda for parameter in average.parameters())
    for _ in range(2):
        parts.step()
        resident.after_update(parts.student.model_chunks)
        offloaded.offload()
        offloaded.after_update(parts.student.model_chunks)
        offloaded.load()
        scores = [teacher.score(parts.microbatches) for teacher in (resident, offloaded)]
        for one, other in zip(*scores, strict=True):  # a few weights may be rounded the other way
            assert (one - other).norm() <= 1e-2 * other.norm()
        assert not all(torch.equal(*pair) for pair in zip(scores[0], parts.teacher_hidden, strict=True))


def free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def settings(path: str, folder: str) -> dict[str, str]:
    """A run that moves everything there is."""
    return {
        "model.path": path,
        "model.dtype": "bfloat16",
        "parallel.tensor_model_parallel_size": "1",
        "data.path": str(Path(folder) / "data" / "train.jsonl"),
        "logging.run_dir": str(Path(folder) / "run"),
        "teacher.placement": "offload",
        "optim.placement": "offload",
        "rollout.gpu_memory_utilization": "0.2",
        "rollout.enforce_eager": "true",
        "train.global_batch_size": "8",
        "train.micro_batch_size": "4",
    }


def sleep_and_wake(path: str, folder: str) -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    config = load_config(str(ARITHMETIC / "opsd.toml"), settings(path, folder))
    layout, prompts = parallel.initialize(config.parallel, seed=0), build_prompts(config)
    trainer = Trainer(config, layout, prompts, Sampler(read_examples(config.data, prompts.tokenizer), seed=0))

    def answers() -> list[list[int]]:
        return [rollout.token_ids for rollout in trainer.engine.generate(PROMPTS, Sampling(8, temperature=0.0), [0, 0])]

    trainer.memory.for_rollout()
    wanted, awake, used = answers(), free(), CuMemAllocator.get_instance().get_current_usage()
    assert used > 2**30
    trainer.memory.for_teacher()  # the teacher comes, and is much smaller
    assert free() - awake >= 0.9 * used
    with pytest.raises(AssertionError, match="refit before"):
        answers()
    trainer.memory.for_student()
    trainer.memory.for_optimizer()
    trainer.memory.for_refit()
    asleep = free()
    refit(trainer.exporter, trainer.engine, 0, verify=True)
    trainer.memory.for_rollout()
    assert asleep - free() >= 0.8 * used  # the weights were awake before
    assert answers() == wanted

    file = Path(folder) / "events.jsonl"
    events.write_to(file, [])
    peaks = [trainer.step(Clock(lambda _: None), lambda: False).metrics["memory_peak_gib"] for _ in range(2)]
    begin = ["KV cache on", "vLLM off", "teacher on", "teacher off", "gradients on", "optimizer states on"]
    moves = [event["what"] for event in read_jsonl(file) if event["event"] == "move"]
    assert moves == 2 * [*begin, "optimizer states off", "gradients off", "vLLM's weights on"]
    # vLLM awake, or training's states: together they would be more than the device gives vLLM.
    assert 0.9 * used / 2**30 <= peaks[0] < 0.25 * torch.cuda.mem_get_info()[1] / 2**30
    trainer.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tied, as 0.6B is: the head that stays is the embedding; with the arithmetic example's tokenizer."""
    path = write_model(tmp_path_factory.mktemp("model"), "qwen3", tied=True, max_position_embeddings=1024, **SHAPE)
    for file in (ARITHMETIC / "base").iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            (path / file.name).write_bytes(file.read_bytes())
    return str(path)


def test_optimizer_states_come_back_bit_for_bit(model: str) -> None:
    run_distributed(move_optimizer_states, 1, model)


def test_gradients_are_freed_and_come_back(model: str) -> None:
    run_distributed(free_gradients, 1, model)


def test_the_teacher_scores_alike_after_its_return(model: str) -> None:
    run_distributed(move_teacher, 1, model)


def test_an_average_stays_in_host_memory(model: str) -> None:
    run_distributed(average_in_host_memory, 1, model)


def test_a_run_ends_with_status_0(model: str, tmp_path: Path) -> None:
    """vLLM's pools sleep when the last step ends; freed asleep, they end the process with a signal or an error line."""
    overrides = write_problems(tmp_path / "data", rows=64) | settings(model, str(tmp_path))
    overrides |= {"train.steps": "2", "evaluate.interval": "0", "checkpoint.save_interval": "0"}
    with Torchrun(1, "-m", "megatron_opsd", *arguments("train", overrides)) as run:
        assert run.finish(timeout=400) == [0], run.output()
        assert "CUDA Error" not in run.output()
    # Also where it is stopped, by a guard after its first step: with the status of a user's mistake.
    overrides |= {"guards.min_response_length": "1000", "guards.patience": "1", "checkpoint.resume": "auto"}
    with Torchrun(1, "-m", "megatron_opsd", *arguments("train", overrides)) as run:
        run.finish(timeout=400)
        assert "exitcode  : 2" in run.output()
        assert "CUDA Error" not in run.output()


def test_vllm_wakes_to_the_same_answers(model: str, tmp_path: Path) -> None:
    write_problems(tmp_path / "data", rows=64)
    run_distributed(sleep_and_wake, 1, model, str(tmp_path))
