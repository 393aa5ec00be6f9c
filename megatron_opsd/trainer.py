"""On-Policy Self-Distillation, one step after the other. run.py is the loop around it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opsd.config import Config
from megatron_opsd.data.batch import Batch, Sample, padding_share, split
from megatron_opsd.data.prompts import PromptBuilder, max_model_len
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.device_memory import DeviceMemory
from megatron_opsd.errors import AbandonedError
from megatron_opsd.evaluate import grade
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import HiddenStateGPT, build_model
from megatron_opsd.model.optimizer import OptimizerStates, Update, build_optimizer, build_schedule, optimizer_step
from megatron_opsd.model.student import LossSums, Student
from megatron_opsd.model.teacher import Teacher
from megatron_opsd.reliability import checkpoint
from megatron_opsd.rollout import build_engine
from megatron_opsd.rollout.engine import Sampling, sample_seed
from megatron_opsd.rollout.refit import check_logprob_gap, refit
from megatron_opsd.telemetry.metrics import Clock, is_due
from megatron_opsd.types import Example, Phase, Progress, Rollout, StepResult
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import Exporter
from megatron_opsd.weights.hf_files import HFReader, write_hf
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable


class Trainer:
    """Student, teacher and engine on this rank, and how far they have come. ``step`` is the algorithm."""

    def __init__(
        self,
        config: Config,
        layout: parallel.Layout,
        prompts: PromptBuilder,
        sampler: Sampler,
        resume_from: Path | None = None,
    ) -> None:
        self.config, self.layout, self.prompts, self.sampler = config, layout, prompts, sampler
        self.table = NameTable(read_architecture(config.model.path))
        reader = HFReader(config.model.path)
        reader.check(self.table.hf_tensors())
        # The engine first: it measures how much of the device is free. It sleeps while the models come.
        self.engine = build_engine(config, max_model_len(config, prompts))
        self.engine.sleep()
        # The teacher before the student: where it is offloaded, the two are never on the device together.
        self.teacher = Teacher(self._load_model(reader), config.teacher.placement)
        self.progress = Progress(self.teacher.identity(self._exporter(self.teacher.model)), sampler.state_dict())
        self.teacher.offload()
        self.student = Student(self._load_model(reader), layout, config, self.table.arch.vocab_size)
        self.optimizer = build_optimizer(self.student, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.train.steps)
        states = OptimizerStates(self.optimizer, config.optim)
        self.memory = DeviceMemory(self.engine, self.teacher, self.student, states)
        self.exporter = self._exporter(self.student.model)
        if resume_from:
            self._resume(resume_from)
        self.memory.for_refit()
        refit(self.exporter, self.engine, self.progress.step, verify=True)

    def step(self, clock: Clock, should_abort: Callable[[], bool]) -> StepResult:
        """One step of On-Policy Self-Distillation.

        Raises:
            AbandonedError: ``should_abort`` was true on a rank before the student's pass. Student and progress are as
                they were; the sampler is not.
        """
        config, progress = self.config, self.progress
        parallel.seed_everything(sample_seed(config.train.seed, progress.step, 0))
        self.memory.seconds = 0.0
        self.memory.for_rollout()
        with clock.phase(Phase.ROLLOUT):
            examples = self._next_examples()
            prompts = [self.prompts.student(example) for example in examples]
            rollouts = self._generate(prompts, should_abort)
        abort_if(should_abort)
        batch = self._build_batch(examples, prompts, rollouts)
        dp, device = self.layout.dp_group, parallel.device()
        assignment = batch.assign(config.train.micro_batch_size, dp.size())
        microbatches = split(batch, assignment, dp.rank(), config.objective.normalization, device)
        self.memory.for_teacher()
        with clock.phase(Phase.TEACHER):
            teacher_hidden = self.teacher.score(microbatches)
        abort_if(should_abort)
        self.memory.for_student()
        with clock.phase(Phase.STUDENT):
            losses = self.student.forward_backward(microbatches, self.teacher.head_weight(), teacher_hidden)
        check_logprob_gap(losses, progress.step, config)  # of the refit before: vLLM against the student
        self.memory.for_optimizer()
        with clock.phase(Phase.OPTIMIZER):
            update = optimizer_step(self.optimizer, self.schedule, losses.means()["loss"])
            progress.step += 1  # from here on there is something to save
            progress.sampler = self.sampler.state_dict()
        self.memory.for_refit()
        with clock.phase(Phase.REFIT):
            verify = is_due(progress.step, config.rollout.refit_verify_interval)
            refit(self.exporter, self.engine, progress.step, verify)
        correct = self._grade(examples, rollouts)
        padding = padding_share(batch, assignment)
        return StepResult(self._metrics(losses, update, rollouts, correct, padding, clock), examples, rollouts, correct)

    def export_hf(self, out: Path) -> None:
        """Write the student as a Hugging Face directory."""
        if self.layout.rank == 0:
            write_hf(self.exporter, Path(self.config.model.path), out, self.student.model.config.params_dtype)
        else:
            for _ in self.exporter:  # the stream is collective
                pass
        dist.barrier()

    def close(self) -> None:
        """Leave the engine. The run has ended on all ranks."""
        self.memory.for_exit()
        self.engine.close()

    def _load_model(self, reader: HFReader) -> HiddenStateGPT:
        model = build_model(self.table.arch, self.config.model, self.config.parallel, self.layout.pg_collection)
        layout = self.layout
        load_hf(model, reader, self.table, layout.shard, layout.dp_group, layout.expert_dp_group)
        return model

    def _exporter(self, model: HiddenStateGPT) -> Exporter:
        bucket_bytes = int(self.config.rollout.refit_bucket_mib * 2**20)
        layout = self.layout
        return Exporter(model, self.table, layout.tp_group, layout.pp_group, layout.ep_group, bucket_bytes)

    def _resume(self, path: Path) -> None:
        self.progress = checkpoint.load(path, self.student.model, self.optimizer, self.progress.teacher)
        self.sampler.load_state_dict(self.progress.sampler)
        self.schedule.step(self.progress.step)

    def _next_examples(self) -> list[Example]:
        """The step's problems, each as often as it is sampled."""
        samples_per_prompt = self.config.rollout.samples_per_prompt
        drawn = self.sampler.next_batch(self.config.train.global_batch_size // samples_per_prompt)
        return [example for example in drawn for _ in range(samples_per_prompt)]

    def _generate(self, prompts: Sequence[list[int]], should_abort: Callable[[], bool]) -> list[Rollout]:
        settings, version = self.config.rollout, self.progress.step
        sampling = Sampling(settings.max_response_tokens, settings.temperature, settings.top_p, settings.top_k)
        seeds = [sample_seed(self.config.train.seed, version + 1, i) for i in range(len(prompts))]
        rollouts = self.engine.generate(prompts, sampling, seeds, should_abort)
        assert all(rollout.weight_version == version for rollout in rollouts), "stale weights"
        return rollouts

    def _build_batch(
        self, examples: Sequence[Example], prompts: Sequence[list[int]], rollouts: Sequence[Rollout]
    ) -> Batch:
        rows = zip(prompts, self._teacher_prompts(examples, prompts), rollouts, strict=True)
        sizes = self.config.parallel
        return Batch(
            [Sample(prompt, teacher_prompt, rollout) for prompt, teacher_prompt, rollout in rows],
            skip_first_tokens=self.config.prompts.skip_first_tokens,
            multiple=sizes.tensor_model_parallel_size if sizes.sequence_parallel else 1,
            one_length=sizes.pipeline_model_parallel_size > 1,
            packing=self.config.train.packing,
        )

    def _teacher_prompts(self, examples: Sequence[Example], prompts: Sequence[list[int]]) -> Sequence[list[int]]:
        context = self.config.teacher.context
        if context == "nothing":
            return prompts
        if context == "shuffled":
            k = self.config.rollout.samples_per_prompt  # neighbours share a problem
            others = [*examples[k:], *examples[:k]]
            examples = [replace(x, solution=other.solution) for x, other in zip(examples, others, strict=True)]
        return [self.prompts.teacher(example) for example in examples]

    def _grade(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> list[bool | None]:
        """Whether each rollout is right; None where the answer is unknown."""
        correct = grade(rollouts, examples, self.prompts.tokenizer, self.config.evaluate.answer_check)
        return [None if example.answer is None else right for example, right in zip(examples, correct, strict=True)]

    def _metrics(
        self,
        losses: LossSums,
        update: Update,
        rollouts: Sequence[Rollout],
        correct: Sequence[bool | None],
        padding: float,
        clock: Clock,
    ) -> dict[str, Any]:
        known = [right for right in correct if right is not None]
        seconds = clock.seconds()
        return {
            "step": self.progress.step,
            **losses.means(),
            **({"accuracy": sum(known) / len(known)} if known else {}),
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "skipped": int(not update.applied),
            "tokens": losses.tokens,
            "padding_share": padding,
            "response_length": sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts),
            "weight_version": rollouts[0].weight_version,
            **seconds,
            "seconds_memory": self.memory.seconds,
            "tokens_per_second": losses.tokens / seconds["seconds_total"],
            "memory_peak_gib": self.memory.peak_gib(),
        }


def abort_if(should_abort: Callable[[], bool]) -> None:
    """Raise AbandonedError on all ranks where one of them should abort."""
    if parallel.any_rank(should_abort()):
        raise AbandonedError("the next step could not end in time")
