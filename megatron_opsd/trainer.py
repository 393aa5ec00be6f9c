"""One training step after the other. run.py is the loop around it, methods/ what is learned from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opsd.config import Config, ModelConfig
from megatron_opsd.data.batch import Batch, Sample, fill_up, padding_share, split
from megatron_opsd.data.curriculum import CurriculumSampler
from megatron_opsd.data.prompts import PromptBuilder, max_model_len
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.data.weighting import Weighting
from megatron_opsd.device_memory import DeviceMemory
from megatron_opsd.errors import StepAbortedError, UserError
from megatron_opsd.methods import build_method
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import ModelChunks, build_model
from megatron_opsd.model.optimizer import OptimizerStates, build_optimizer, build_schedule, optimizer_step
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import EmaTeacher, FrozenTeacher, LiveTeacher, Teacher
from megatron_opsd.reliability import checkpoint
from megatron_opsd.reliability.resume import meaning, read_progress
from megatron_opsd.rollout import build_engine
from megatron_opsd.rollout.engine import NoEngine, sample_seed
from megatron_opsd.rollout.refit import check_logprob_gap, refit, verified
from megatron_opsd.telemetry.metrics import Clock, is_due
from megatron_opsd.types import Grade, Group, Phase, Progress, StepResult
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import Exporter
from megatron_opsd.weights.hf_files import HFReader, write_hf
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable

NONE, INITIAL = -2, -1  # instead of the version of a student's weights


class Trainer:
    """Method, student, teacher and engine on this rank, and how far they have come. ``step`` is the algorithm."""

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
        reader.check_tied_head(self.table.arch)
        # The engine first: it measures how much of the device is free. It sleeps while the models come.
        self.engine = build_engine(config, max_model_len(config, prompts)) if config.needs_engine else NoEngine()
        self.engine.sleep()
        self.engine_version = NONE  # of the weights that the engine holds
        self.method = build_method(config, prompts, sampler, self.engine)
        # The teacher before the student: where it is offloaded, the two are never on the device together.
        self.progress = Progress(config.teacher_kind or "none", sampler.state_dict(), meaning=meaning(config))
        self.teacher = self._own_teacher(reader) if self.method.loss.needs_teacher else None
        self.student = Student(self._load_model(reader), layout, config, self.table.arch.vocab_size, self.method.loss)
        if self.method.loss.needs_teacher and self.teacher is None:
            self.teacher = LiveTeacher(self.student.model_chunks)
        self.optimizer = build_optimizer(self.student, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.train.steps)
        states = OptimizerStates(self.optimizer, config.optim)
        self.memory = DeviceMemory(self.engine, self.teacher, self.student, states)
        self.exporter = self._exporter(self.student.model_chunks)
        if resume_from:
            self._resume(resume_from)
        if config.method.writes_rollouts:
            self.memory.for_refit()
            self.refit(verify=True)
        else:
            self.memory.after_training()

    def step(self, clock: Clock, should_abort: Callable[[], bool]) -> StepResult:
        """One step of any method.

        Raises:
            StepAbortedError: ``should_abort`` was true on a rank before the student's pass. Student and progress are as
                they were; the sampler is not.
        """
        config, progress = self.config, self.progress
        parallel.seed_everything(sample_seed(config.train.seed, progress.step, 0))
        self.memory.seconds = 0.0
        if config.method.writes_rollouts:
            self.memory.for_rollout()
        with clock.phase(Phase.ROLLOUT):
            groups = self.method.collect(progress.step, should_abort)
        abort_if(should_abort)
        samples = self.method.samples(groups)
        if not samples:
            return self._learn_nothing(groups, clock)
        batch = build_batch(samples, config, self.prompts, self.layout.dp_group.size())
        if batch.is_empty:
            return self._learn_nothing(groups, clock)
        dp = self.layout.dp_group
        assignment = batch.assign(config.train.micro_batch_size, dp.size())
        microbatches = split(batch, assignment, dp.rank(), parallel.device())
        self.memory.for_teacher()
        with clock.phase(Phase.TEACHER):
            teacher_hidden = self.teacher.score(microbatches) if self.teacher else []
        abort_if(should_abort)
        self.memory.for_student()
        with clock.phase(Phase.STUDENT):
            teacher_head = self.teacher.head_weight() if self.teacher else None
            losses = self.student.forward_backward(
                microbatches, teacher_head, teacher_hidden, progress.entropy_threshold
            )
        if config.method.writes_rollouts:
            check_logprob_gap(losses, progress.step, config)  # of the refit before: vLLM against the student
        self.memory.for_optimizer()
        with clock.phase(Phase.OPTIMIZER):
            update = optimizer_step(self.optimizer, self.schedule, losses.means()["loss"])
            if self.teacher and update.applied:
                self.teacher.after_update(self.student.model_chunks)
            if config.objective.entropy_share < 1 and update.applied:
                progress.entropy_threshold = losses.entropy_threshold(config.objective.entropy_share)
            self._count_step(groups)  # from here on there is something to save
        if config.method.writes_rollouts:
            self.memory.for_refit()
            with clock.phase(Phase.REFIT):
                self.refit(verify=is_due(progress.step, config.rollout.refit_verify_interval))
        else:
            self.memory.after_training()
        learned = {
            **losses.means(),
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "skipped": int(not update.applied),
            "samples": len(samples),
            "tokens": losses.tokens,
            "padding_share": padding_share(batch, assignment),
        }
        return StepResult(self._metrics(groups, learned, clock), groups)

    def refit(self, verify: bool) -> None:
        """Bring the student's weights into the engine, for which there is room."""
        refit(self.exporter, self.engine, self.progress.step, verify)
        self.engine_version = self.progress.step

    def prepare(self, should_abort: Callable[[], bool]) -> int:
        """Before the first step: write some of what the method wants written. Returns how many problems are left.

        Raises:
            StepAbortedError: ``should_abort`` was true on a rank.
        """
        steps = self.config.train.steps - self.progress.step
        left = self.method.prepare(steps, self._ready_initial_weights, should_abort)
        if not left and self.engine_version == INITIAL:
            self.memory.without_training()
        return left

    def _ready_initial_weights(self) -> None:
        """Make the engine ready to write with the weights that the run starts from."""
        if self.progress.step == 0:  # they are the student's
            self.ready_engine()
            return
        if self.engine_version != INITIAL:
            reader, expected = HFReader(self.config.model.path), self.table.hf_tensors()
            self.memory.for_refit()
            weights = ((name, reader.read(name).to(parallel.device())) for name in expected)
            self.engine.update_weights(verified(weights, expected, {}), version=0)
            self.engine_version = INITIAL
        self.memory.for_rollout()

    def ready_engine(self) -> None:
        """Make the engine ready to write with the student's weights, outside of a step."""
        if self.engine_version != self.progress.step:
            self.memory.for_refit()
            self.refit(verify=True)
        self.memory.for_rollout()

    def export_hf(self, out: Path) -> None:
        """Write the student as a Hugging Face directory."""
        if self.layout.rank == 0:
            write_hf(self.exporter, Path(self.config.model.path), out, self.student.model_chunks.config.params_dtype)
        else:
            for _ in self.exporter:  # the stream is collective
                pass
        dist.barrier()

    def close(self) -> None:
        """Leave the engine. The run has ended on all ranks."""
        self.memory.for_exit()
        self.engine.close()

    def _load_model(self, reader: HFReader) -> ModelChunks:
        model, layout = self._build_model(self.config.model), self.layout
        load_hf(model, reader, self.table, layout.shard, layout.dp_group, layout.expert_dp_group)
        return model

    def _own_teacher(self, reader: HFReader) -> Teacher | None:
        """The teacher, where it has weights of its own; offloaded."""
        settings = self.config.teacher
        if settings.kind == "live":
            return None
        model = self._load_model(reader)
        if settings.kind == "ema":
            wide = self.config.model.model_copy(update={"dtype": "float32"})
            self.progress.teacher = f"ema {settings.ema_decay}"
            teacher = EmaTeacher(model, settings.placement, settings.ema_decay, lambda: self._build_model(wide))
        else:
            teacher = FrozenTeacher(model, settings.placement)
            self.progress.teacher = teacher.identity(self._exporter(model))
        teacher.offload()
        return teacher

    def _build_model(self, config: ModelConfig) -> ModelChunks:
        return build_model(self.table.arch, config, self.config.parallel, self.layout.pg_collection)

    def _exporter(self, model: ModelChunks) -> Exporter:
        bucket_bytes = int(self.config.rollout.refit_bucket_mib * 2**20)
        layout = self.layout
        return Exporter(model, self.table, layout.tp_group, layout.pp_group, layout.ep_group, bucket_bytes)

    def _resume(self, path: Path) -> None:
        now, self.progress = self.progress, read_progress(path)
        self.progress.sampler = now.sampler  # which goes on from the checkpoint, or begins with other data
        if self.config.checkpoint.allow_changes:
            if self.progress.meaning != now.meaning:
                self.progress.entropy_threshold = None  # of another loss, perhaps
            self.progress.teacher, self.progress.meaning = now.teacher, now.meaning
        elif self.progress.teacher != now.teacher:
            raise UserError(
                f"{path}: was trained with the teacher {self.progress.teacher[:16]}, but this run's is "
                f"{now.teacher[:16]}; resume with the model.path that the run started with, or with "
                "--checkpoint.allow_changes true"
            )
        checkpoint.load(path, self.student.model_chunks, self.optimizer, self.teacher)
        self.schedule.step(self.progress.step)

    def _count_step(self, groups: list[Group]) -> None:
        self.sampler.update(groups)
        self.progress.step += 1
        self.progress.sampler = self.sampler.state_dict()

    def _learn_nothing(self, groups: list[Group], clock: Clock) -> StepResult:
        """A step whose method found nothing to learn from: it counts, and the weights stay as they are."""
        lr = self.optimizer.param_groups[0]["lr"]
        self.schedule.step(1)
        self._count_step(groups)
        if self.config.method.writes_rollouts:
            self.memory.without_training()
            self.memory.for_refit()
            with clock.phase(Phase.REFIT):
                self.refit(verify=False)  # the same weights under their new number
        nothing = {"grad_norm": 0.0, "lr": lr, "skipped": 0, "samples": 0, "tokens": 0.0, "padding_share": 0.0}
        return StepResult(self._metrics(groups, nothing, clock), groups)

    def _metrics(self, groups: Sequence[Group], learned: dict[str, Any], clock: Clock) -> dict[str, Any]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        seconds = clock.seconds()
        return {
            "step": self.progress.step,
            **learned,
            **measure_answers(groups),
            "response_length": sum(lengths) / len(lengths),
            "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
            "tokens_written": sum(lengths) if self.config.method.writes_rollouts else 0,
            **({"window": self.sampler.window} if isinstance(self.sampler, CurriculumSampler) else {}),
            "weight_version": rollouts[0].weight_version,
            **seconds,
            "seconds_memory": self.memory.seconds,
            "tokens_per_second": learned["tokens"] / seconds["seconds_total"],
            "memory_peak_gib": self.memory.peak_gib(),
        }


def build_batch(samples: list[Sample], config: Config, prompts: PromptBuilder, dp_size: int) -> Batch:
    """The global batch of a step, filled up to what the layout needs."""
    sizes, train = config.parallel, config.train
    micro_batch_size = 1 if train.packing else train.micro_batch_size
    skip, trains_on_end = prompts.skip_first_tokens, prompts.train_on_end_of_turn is not False
    if config.method.teacher_sees != "nothing":  # else no turn begins or ends otherwise than the student's
        trains_on_end = prompts.trains_on_end_of_turn
        skip = prompts.untrained_at_start if config.method.samples_responses else skip
    weighting = Weighting(
        config.objective.normalization, config.longest_response, config.objective.position_weights, skip, trains_on_end
    )
    return Batch(
        fill_up(samples, dp_size * micro_batch_size),
        weighting,
        multiple=sizes.tensor_model_parallel_size if sizes.sequence_parallel else 1,
        one_length=sizes.pipeline_model_parallel_size > 1,
        packing=train.packing,
    )


def measure_answers(groups: Sequence[Group]) -> dict[str, float]:
    """How right the answers are that the student wrote alone, and those that it wrote with the solution in sight."""
    measured = {}
    for name, in_sight in (("accuracy", False), ("accuracy_in_sight", True)):
        grades = [grade for group in groups if group.solution_in_sight == in_sight for grade in group.grades]
        known = [grade for grade in grades if grade != Grade.UNKNOWN]
        if known:
            measured[name] = known.count(Grade.RIGHT) / len(known)
    several = [group for group in groups if len(group.grades) > 1 and Grade.UNKNOWN not in group.grades]
    if several:
        measured["groups_without_signal"] = sum(not group.has_signal for group in several) / len(several)
    return measured


def abort_if(should_abort: Callable[[], bool]) -> None:
    """Raise StepAbortedError on all ranks where one of them should abort."""
    if parallel.any_rank(should_abort()):
        raise StepAbortedError("the next step could not end in time")
