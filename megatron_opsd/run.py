"""A run from its start to its outcome: when to save and to evaluate, and what signals and failures lead to."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from megatron_opsd import events
from megatron_opsd.config import Config
from megatron_opsd.data.curriculum import build_sampler
from megatron_opsd.data.datasets import check_grades, read_examples, read_held_out
from megatron_opsd.data.prompts import build_prompts
from megatron_opsd.errors import RunStoppedError, StepAbortedError, UserError
from megatron_opsd.evaluate import evaluate
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import layers_in_use
from megatron_opsd.model.parallel import on_rank_0
from megatron_opsd.reliability import checkpoint, resume
from megatron_opsd.reliability.guards import Guards
from megatron_opsd.reliability.preemption import SAVE_MARGIN, PreemptionHandler
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.reliability.run_lock import RunLock
from megatron_opsd.reliability.watchdog import Watchdog
from megatron_opsd.rollout.engine import NoServerLeftError
from megatron_opsd.telemetry.metrics import Clock, MetricsWriter, is_due, start_logging
from megatron_opsd.trainer import Trainer
from megatron_opsd.types import Example

T = TypeVar("T")


def train(config: Config) -> None:
    """Run until ``train.steps``, or until a signal. Every rank of the run calls this."""
    layout = parallel.initialize(config.parallel, config.train.seed)
    preemption = PreemptionHandler(config.checkpoint.signal_lead_seconds)
    run_dir = RunDir(config.logging.run_dir)
    lock = RunLock(run_dir.path)
    on_rank_0(lambda: take(run_dir, lock))
    try:
        if not end_if_done(config, run_dir):
            run_to_end(config, layout, run_dir, preemption)
    finally:
        if layout.rank == 0:
            lock.release()
    parallel.finalize()


def take(run_dir: RunDir, lock: RunLock) -> None:
    """Make this run the folder's only one, and forget how an earlier start ended."""
    run_dir.prepare()
    lock.acquire(partial(print, flush=True))
    run_dir.outcome.unlink(missing_ok=True)


def end_if_done(config: Config, run_dir: RunDir) -> bool:
    """Whether there is nothing to do, which then is the outcome. All ranks call this."""
    step = on_rank_0(lambda: resume.is_done(config))
    if step is None:
        return False
    if dist.get_rank() == 0:
        said = f"train.steps = {config.train.steps} is reached: {step} steps are done; raise it to go on"
        print(said, flush=True)
        run_dir.write_outcome("finished", f"all steps are done, after step {step}")
    return True


def run_to_end(config: Config, layout: parallel.Layout, run_dir: RunDir, preemption: PreemptionHandler) -> None:
    """A start of the run: everything from loading to the outcome."""
    if layout.rank == 0:
        ranks = f"{layout.world_size} ranks, {layers_in_use()} layers"
        print(f"loading {config.model.path} on {ranks}; messages go to {run_dir.logs}", flush=True)
    start_logging(run_dir, layout.rank)
    run = Run(config, layout, run_dir, preemption)
    step = run.trainer.progress.step
    with MetricsWriter(config, run.trainer.prompts.tokenizer, step, enabled=layout.rank == 0) as writer:
        events.record("start", step=step, world_size=layout.world_size, layers=layers_in_use())
        if step:
            writer.say(f"going on after step {step}")
        writer.warn([f"changed since the checkpoint: {change}" for change in run.changes])
        interrupted_by = run.run_steps(writer)
    run.close(interrupted_by)


class Run:
    """The trainer, and what watches over it."""

    def __init__(self, config: Config, layout: parallel.Layout, run_dir: RunDir, preemption: PreemptionHandler) -> None:
        self.config, self.layout, self.run_dir, self.preemption = config, layout, run_dir, preemption
        self.watchdog = Watchdog(config.timeouts, preemption)  # it also watches over what follows
        # First what may be a user's mistake, then what takes minutes.
        resume_from = checkpoint.find(run_dir, config.checkpoint.resume)
        self.changes = on_rank_0(lambda: resume.check_meaning(resume_from, config))
        self.checkpoints = checkpoint.Checkpoints(run_dir, config.checkpoint)
        prompts = build_prompts(config)
        self.held_out: list[Example] = []
        if config.evaluate.data and config.evaluate.interval:
            self.held_out = read_held_out(config.evaluate.data, prompts.tokenizer)[: config.evaluate.limit]
        examples = read_examples(config.data, prompts.tokenizer, reads=config.reads)
        if config.method.writes_rollouts:
            check_grades(examples, config)
        check_same_data(examples)
        sampler = build_sampler(examples, config.train)
        if resume_from:
            sampler.load_state_dict(resume.read_progress(resume_from).sampler, config.checkpoint.allow_changes)
        self.trainer = Trainer(config, layout, prompts, sampler, resume_from)
        self.checkpoints.saved_step = self.trainer.progress.step
        self.guards = Guards(config.guards, self.trainer.progress.guards)
        self.step_seconds = math.inf  # of the last one; not known yet

    def run_steps(self, writer: MetricsWriter) -> str:
        """Steps, evaluations and checkpoints, and at the end the trained model.

        Returns what interrupted the run, after a last save; empty where all steps are done.
        """
        progress, interval = self.trainer.progress, self.config.checkpoint.save_interval
        interrupted_by = ""
        try:
            while left := self.trainer.prepare(lambda: self.preemption.received):
                writer.say(f"the teacher's responses: {left} problems are left to write")
                self.watchdog.enter("rollout")
            while True:
                self.evaluate_if_due(writer)
                if progress.step >= self.config.train.steps:
                    break
                if parallel.any_rank(self.preemption.received):
                    interrupted_by = self.preemption.name
                    break
                if is_due(progress.step, interval) and self.checkpoints.saved_step < progress.step:
                    attempt(self.save, writer)
                clock = Clock(self.watchdog.enter)
                result = self.trainer.step(clock, partial(self.should_abort, clock))
                self.step_seconds = clock.elapsed()
                # The checkpoint was written during the step. Complete it before the step is recorded.
                writer.warn(attempt(self.finish_saving, writer) or [])
                writer.step(result)
                writer.warn(self.guards.step(result.metrics))
        except StepAbortedError as error:
            interrupted_by = f"{self.preemption.name}, {error}"
        except NoServerLeftError as error:
            interrupted_by = str(error)
        except RunStoppedError:
            self.finish_saving()
            raise
        if interrupted_by:
            writer.warn([f"{interrupted_by}: leaving after step {progress.step}"])
        if interval and self.checkpoints.saved_step < progress.step:
            self.save()
        self.finish_saving()
        if interrupted_by:
            writer.say(how_to_go_on(progress.step, self.checkpoints.saved_step))
        elif self.config.checkpoint.export_hf:
            self.watchdog.enter("save")
            on_rank_0(lambda: self.run_dir.write_exported_step(None))
            self.trainer.export_hf(self.run_dir.hf)
            on_rank_0(lambda: self.run_dir.write_exported_step(progress.step))
            writer.say(f"the trained model is in {self.run_dir.hf}")
        return interrupted_by

    def evaluate_if_due(self, writer: MetricsWriter) -> None:
        """Accuracy on the held-out problems: before the first step, every ``interval`` steps, after the last."""
        progress, settings = self.trainer.progress, self.config.evaluate
        due = progress.step in (0, self.config.train.steps) or is_due(progress.step, settings.interval)
        if not (self.held_out and due and progress.evaluated_step < progress.step):
            return
        self.watchdog.enter("evaluate")
        trainer = self.trainer
        trainer.ready_engine()
        evaluation = evaluate(
            trainer.engine, trainer.prompts, self.held_out, self.config, lambda: self.preemption.received
        )
        progress.evaluated_step = progress.step
        writer.evaluation(progress.step, evaluation)
        writer.warn(self.guards.evaluation(progress.step, evaluation))

    def save(self) -> None:
        """Begin to write a checkpoint of the run between two steps."""
        self.watchdog.enter("save")
        trainer = self.trainer
        trainer.progress.guards = self.guards.state_dict()
        keep = self.guards.best_step
        self.checkpoints.save(trainer.student.model_chunks, trainer.optimizer, trainer.teacher, trainer.progress, keep)

    def finish_saving(self) -> list[str]:
        """Wait for the checkpoint under way, if any. Returns warnings about it."""
        self.watchdog.enter("save")
        finished = self.checkpoints.finish()
        seconds, lead = self.checkpoints.seconds, self.config.checkpoint.signal_lead_seconds
        if not finished or SAVE_MARGIN * seconds <= lead:
            return []
        return [
            f"a checkpoint took {seconds:.1f} s, for which checkpoint.signal_lead_seconds = {lead:g} leaves no room; "
            f"let signals come {SAVE_MARGIN * seconds + self.step_seconds:.0f} s before the end (a step and a save)"
        ]

    def should_abort(self, clock: Clock) -> bool:
        """Whether a signal has come that leaves this rank too little time to finish the step and save after it."""
        step_left = max(0.0, self.step_seconds - clock.elapsed())
        save_seconds = SAVE_MARGIN * self.checkpoints.seconds if self.config.checkpoint.save_interval else 0.0
        return not self.preemption.has_time_for(step_left + save_seconds)

    def close(self, interrupted_by: str) -> None:
        """Write the outcome, and leave watchdog and engine. All ranks call this."""
        if self.layout.rank == 0:
            why = f"{interrupted_by or 'all steps are done'}, after step {self.trainer.progress.step}"
            self.run_dir.write_outcome("interrupted" if interrupted_by else "finished", why)
        dist.barrier()  # the first rank that leaves may take the others along
        self.watchdog.close()
        self.trainer.close()


def how_to_go_on(step: int, saved_step: int) -> str:
    """What a person who has interrupted the run does next."""
    if step == 0:
        return "no step is done; to go on, give the same command with --checkpoint.resume auto"
    if saved_step < step:
        return f"nothing is saved of the steps after {saved_step} (checkpoint.save_interval = 0)"
    return f"saved after step {step}; to go on, give the same command with --checkpoint.resume auto"


def attempt(action: Callable[[], T], writer: MetricsWriter) -> T | None:
    """A checkpoint that cannot be written costs a line, not the run."""
    try:
        return action()
    except checkpoint.SaveError as error:
        writer.warn([f"{error}; going on without it"])
        return None


def check_same_data(examples: Sequence[Example]) -> None:
    """Raise UserError unless all ranks have read the same data, answers included."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(f"data.path: rank {rank} reads other data than rank 0; give all nodes the same file")
