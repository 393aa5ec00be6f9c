"""On-Policy Self-Distillation, one step after the other."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_opsd import events
from megatron_opsd.config import Config
from megatron_opsd.data.batch import Batch, Sample, padding_share, split
from megatron_opsd.data.datasets import read_examples, read_held_out
from megatron_opsd.data.prompts import build_prompts, max_model_len
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.device_memory import DeviceMemory
from megatron_opsd.errors import AbandonedError, RunStoppedError, UserError
from megatron_opsd.evaluate import evaluate, grade
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import HiddenStateGPT, build_model, layers_in_use
from megatron_opsd.model.optimizer import OptimizerStates, build_optimizer, build_schedule, optimizer_step
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import Teacher
from megatron_opsd.reliability import checkpoint, run_dir
from megatron_opsd.reliability.guards import Guards
from megatron_opsd.reliability.preemption import PreemptionHandler
from megatron_opsd.reliability.watchdog import Watchdog
from megatron_opsd.rollout import build_engine
from megatron_opsd.rollout.engine import NoServerLeftError, Sampling, sample_seed
from megatron_opsd.rollout.refit import check_logprob_gap, refit
from megatron_opsd.telemetry.metrics import Clock, MetricsWriter, is_due, start_logging
from megatron_opsd.types import Evaluation, Example, Rollout, StepResult
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.export import Exporter
from megatron_opsd.weights.hf_files import HFReader, write_hf
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable

log = logging.getLogger(__name__)

T = TypeVar("T")
SAVE_MARGIN = 1.5  # how much longer than the last save the next may take


class Trainer:
    """All that a run needs, built in the order that finds mistakes first. ``step`` is the algorithm."""

    def __init__(self, config: Config, layout: parallel.Layout, preemption: PreemptionHandler) -> None:
        self.config, self.layout, self.preemption = config, layout, preemption
        self.watchdog = Watchdog(config.timeouts, preemption)
        self.run_dir = Path(config.logging.run_dir)
        resume_from = checkpoint.find(self.run_dir, config.checkpoint.resume)
        self.checkpoints = checkpoint.Checkpoints(self.run_dir, config.checkpoint)
        self.guards = Guards(config.guards)
        self.prompts = build_prompts(config)
        self.sampler = Sampler(read_examples(config.data, self.prompts.tokenizer), config.train.seed)
        check_same_data(self.sampler)
        self.table = NameTable(read_architecture(config.model.path))
        reader = HFReader(config.model.path)
        reader.check(self.table.hf_tensors())

        self.engine = build_engine(config, max_model_len(config, self.prompts))
        self.engine.sleep()
        self.teacher = Teacher(self._load_model(reader), config.teacher.placement)
        self.teacher_identity = self.teacher.identity(self._exporter(self.teacher.model))
        self.teacher.offload()
        self.student = Student(self._load_model(reader), layout, config, self.table.arch.vocab_size)
        self.optimizer = build_optimizer(self.student, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.train.steps)
        states = OptimizerStates(self.optimizer, config.optim)
        self.memory = DeviceMemory(self.engine, self.teacher, self.student, states)
        self.exporter = self._exporter(self.student.model)
        self.steps_done = 0  # also the version of the student's weights
        self.saved = self._saving = 0  # after which step, last
        self.evaluated = -1
        self._sampled = self.sampler.state_dict()  # where the sampler stood after them
        self._step_seconds = math.inf  # not known yet
        if resume_from:
            self._resume(resume_from)
        self.memory.enter("refit")
        refit(self.exporter, self.engine, self.steps_done, verify=True)

    def step(self) -> StepResult:
        """One step of On-Policy Self-Distillation."""
        config, layout, clock = self.config, self.layout, Clock(self._enter)
        late = partial(self._late, clock)
        parallel.seed_everything(sample_seed(config.train.seed, self.steps_done, 0))
        with clock.phase("rollout"):
            examples = self._next_examples()
            rollouts = self._generate(examples, late)
        self._abort_if(late)
        batch = self._build_batch(examples, rollouts)
        microbatches = split(
            batch, config.train.micro_batch_size, layout.dp_group, config.objective.normalization, parallel.device()
        )
        with clock.phase("teacher"):
            teacher_hidden = self.teacher.score(microbatches)
        self._abort_if(late)
        with clock.phase("student"):
            losses = self.student.forward_backward(microbatches, self.teacher.head_weight(), teacher_hidden)
        check_logprob_gap(losses, rollouts[0].weight_version, config)
        with clock.phase("optimizer"):
            grad_norm, lr, updated = optimizer_step(self.optimizer, self.schedule, losses.means()["loss"])
            self.steps_done += 1
            self._sampled = self.sampler.state_dict()
        with clock.phase("refit"):
            verify = is_due(self.steps_done, config.rollout.refit_verify_interval)
            refit(self.exporter, self.engine, self.steps_done, verify)
        correct = self._grade(examples, rollouts)
        known = [right for right in correct if right is not None]
        metrics = {
            "step": self.steps_done,
            **losses.means(),
            **({"accuracy": sum(known) / len(known)} if known else {}),
            "grad_norm": grad_norm,
            "lr": lr,
            "skipped": int(not updated),
            "tokens": losses.tokens,
            "padding_share": padding_share(batch, config.train.micro_batch_size, layout.dp_group.size()),
            "response_length": sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts),
            "weight_version": rollouts[0].weight_version,
            **(seconds := clock.seconds()),
            "tokens_per_second": losses.tokens / seconds["seconds_total"],
            "memory_peak_gib": self.memory.peak_gib(),
        }
        self._step_seconds = seconds["seconds_total"]
        return StepResult(metrics, examples, rollouts, correct)

    def evaluate(self, examples: Sequence[Example]) -> Evaluation:
        """Accuracy of the student's weights as the engine holds them."""
        self._enter("evaluate")
        evaluation = evaluate(self.engine, self.prompts, examples, self.config, lambda: self.preemption.received)
        self.evaluated = self.steps_done
        return evaluation

    def save(self) -> None:
        """Begin to write a checkpoint of the run as it stands between two steps."""
        self.watchdog.enter("save")
        guards = self.guards.state_dict()
        progress = checkpoint.Progress(self.steps_done, self._sampled, self.teacher_identity, self.evaluated, guards)
        self.checkpoints.save(self.student.model, self.optimizer, progress, keep=self.guards.best_step)
        self._saving = self.steps_done

    def finish_saving(self) -> list[str]:
        """Wait for the checkpoint under way, if any. Returns what the reader should know about it."""
        self.watchdog.enter("save")
        was_saving = self.saved < self._saving
        self.checkpoints.finish()
        self.saved = self._saving
        lead, save = self.config.checkpoint.signal_lead_seconds, SAVE_MARGIN * self.checkpoints.seconds
        if not was_saving or save <= lead:
            return []
        return [
            f"a checkpoint took {self.checkpoints.seconds:.1f} s, for which checkpoint.signal_lead_seconds = {lead:g} "
            f"leaves no room; let signals come {save + self._step_seconds:.0f} s before the end (a step and a save)"
        ]

    def export_hf(self) -> None:
        """Write the student as a Hugging Face directory, run_dir/hf."""
        self.watchdog.enter("save")
        dtype = self.student.model.config.params_dtype
        if self.layout.rank == 0:
            write_hf(self.exporter, Path(self.config.model.path), self.run_dir / "hf", dtype)
        else:
            for _ in self.exporter:  # the stream is collective
                pass
        dist.barrier()

    def close(self) -> None:
        """Leave the watchdog and the engine. The run has ended on all ranks."""
        self.watchdog.close()
        self.memory.enter("end")
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
        progress = checkpoint.load(path, self.student.model, self.optimizer, self.teacher_identity)
        self.sampler.load_state_dict(progress.sampler)
        self.guards.load_state_dict(progress.guards)
        self._sampled = progress.sampler
        self.steps_done = self.saved = self._saving = progress.step
        self.evaluated = progress.evaluated
        self.schedule.step(self.steps_done)
        log.info("resumed from %s", path)

    def _enter(self, phase: str) -> None:
        self.watchdog.enter(phase)
        self.memory.enter(phase)

    def _late(self, clock: Clock) -> bool:
        """Whether a signal has come that leaves this rank too little time to finish the step and save after it."""
        step = max(0.0, self._step_seconds - clock.elapsed())
        save = SAVE_MARGIN * self.checkpoints.seconds if self.config.checkpoint.save_interval else 0.0
        return self.preemption.late(step + save)

    def _abort_if(self, late: Callable[[], bool]) -> None:
        if parallel.any_rank(late()):
            raise AbandonedError("could not end in time")

    def _next_examples(self) -> list[Example]:
        """The step's problems, each as often as it is sampled."""
        samples = self.config.rollout.samples_per_prompt
        drawn = self.sampler.next_batch(self.config.train.global_batch_size // samples)
        return [example for example in drawn for _ in range(samples)]

    def _generate(self, examples: Sequence[Example], late: Callable[[], bool]) -> list[Rollout]:
        rollout = self.config.rollout
        sampling = Sampling(rollout.max_response_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
        seeds = [sample_seed(self.config.train.seed, self.steps_done + 1, i) for i in range(len(examples))]
        rollouts = self.engine.generate([self.prompts.student(x) for x in examples], sampling, seeds, late)
        assert all(rollout.weight_version == self.steps_done for rollout in rollouts), "stale weights"
        return rollouts

    def _build_batch(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> Batch:
        samples = [
            Sample(self.prompts.student(example), teacher_prompt, rollout)
            for example, teacher_prompt, rollout in zip(
                examples, self._teacher_prompts(examples), rollouts, strict=True
            )
        ]
        layout = self.config.parallel
        multiple = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        one_length = layout.pipeline_model_parallel_size > 1
        skip, packing = self.config.prompts.skip_first_tokens, self.config.train.packing
        return Batch(samples, skip, multiple, one_length, packing)

    def _teacher_prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        context = self.config.teacher.context
        if context == "nothing":
            return [self.prompts.student(example) for example in examples]
        if context == "shuffled":
            k = self.config.rollout.samples_per_prompt  # neighbours share a problem
            others = [*examples[k:], *examples[:k]]
            examples = [replace(x, solution=other.solution) for x, other in zip(examples, others, strict=True)]
        return [self.prompts.teacher(example) for example in examples]

    def _grade(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> list[bool | None]:
        """Whether each rollout is right; None where the answer is unknown."""
        right = grade(rollouts, examples, self.prompts.tokenizer, self.config.evaluate.answer_check)
        return [None if x.answer is None else correct for x, correct in zip(examples, right, strict=True)]


def train(config: Config) -> None:
    """Run until ``train.steps``, or until a signal. Every rank of the run calls this."""
    layout = parallel.initialize(config.parallel, config.train.seed)
    preemption = PreemptionHandler(config.checkpoint.signal_lead_seconds)
    folder = Path(config.logging.run_dir)
    if layout.rank == 0:
        run_dir.prepare(folder)
        ranks = f"{layout.world_size} ranks, {layers_in_use()} layers"
        print(f"loading {config.model.path} on {ranks}; messages go to {folder / 'logs'}", flush=True)
    dist.barrier()
    start_logging(folder, layout.rank)
    held_out: list[Example] = []
    if config.evaluate.data and config.evaluate.interval:
        tokenizer = build_prompts(config).tokenizer
        held_out = read_held_out(config.evaluate.data, tokenizer)[: config.evaluate.limit]
    trainer = Trainer(config, layout, preemption)
    with MetricsWriter(config, trainer.prompts.tokenizer, trainer.steps_done, enabled=layout.rank == 0) as writer:
        events.record("start", step=trainer.steps_done, world_size=layout.world_size, layers=layers_in_use())
        if trainer.steps_done:
            writer.say(f"going on after step {trainer.steps_done}")
        broken_off = run(trainer, held_out, writer)
        if not broken_off and config.checkpoint.export_hf:
            trainer.export_hf()
            writer.say(f"the trained model is in {folder / 'hf'}")
    if layout.rank == 0:
        why = f"{broken_off or 'all steps are done'}, after step {trainer.steps_done}"
        run_dir.write_outcome(folder, "interrupted" if broken_off else "finished", why)
    dist.barrier()  # the first rank that leaves may take the others along
    trainer.close()
    parallel.finalize()


def run(trainer: Trainer, held_out: Sequence[Example], writer: MetricsWriter) -> str:
    """Steps, evaluations and checkpoints until all are done, or broken off and saved. Returns why it was broken off."""
    settings, last = trainer.config, trainer.config.train.steps
    saves = settings.checkpoint.save_interval
    broken_off = ""
    try:
        while True:
            done = trainer.steps_done
            due = done in (0, last) or is_due(done, settings.evaluate.interval)
            if held_out and due and trainer.evaluated < done:
                evaluation = trainer.evaluate(held_out)
                writer.evaluation(done, evaluation)
                writer.warn(trainer.guards.evaluation(done, evaluation))
            if done == last:
                break
            if parallel.any_rank(trainer.preemption.received):
                raise AbandonedError("not begun")
            if is_due(done, saves) and trainer.saved < done:
                attempt(trainer.save, writer)
            result = trainer.step()
            # It was written meanwhile, and is complete before this step is recorded.
            writer.warn(attempt(trainer.finish_saving, writer) or [])
            writer.step(result)
            writer.warn(trainer.guards.step(result.metrics))
    except AbandonedError as reason:
        broken_off = f"{trainer.preemption.name}, the next step {reason}"
    except NoServerLeftError as reason:
        broken_off = str(reason)
    except RunStoppedError:
        trainer.finish_saving()
        raise
    if broken_off:
        writer.warn([f"{broken_off}: saving after step {trainer.steps_done}, and leaving"])
    if saves and trainer.saved < trainer.steps_done:
        trainer.save()
    trainer.finish_saving()
    return broken_off


def attempt(save: Callable[[], T], writer: MetricsWriter) -> T | None:
    """A checkpoint that cannot be written costs a line, not the run."""
    try:
        return save()
    except checkpoint.SaveError as error:
        writer.warn([f"{error}; going on without it"])
        return None


def check_same_data(sampler: Sampler) -> None:
    """Raise UserError unless all ranks have read the same data."""
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, sampler.digest)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(f"data.path: rank {rank} reads other data than rank 0; give all nodes the same file")
