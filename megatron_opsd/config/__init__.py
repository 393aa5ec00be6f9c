"""The whole configuration of a run: one frozen, strict schema. config_file.py reads it from TOML.

The string under each field is its ``--help``. What can be said of settings without a model or a cluster is checked
here, by validators whose errors name the settings; the rest is plan/preflight.py's.
"""

from typing import Literal, Self

from pydantic import model_validator

from megatron_opsd.config.method import (
    DistillConfig,
    GrpoConfig,
    MethodConfig,
    OpsdConfig,
    Reads,
    SftConfig,
    StarConfig,
)
from megatron_opsd.config.prompts import ANSWER_TEMPLATE, STUDENT_TEMPLATE, TEACHER_TEMPLATE, PromptsConfig
from megatron_opsd.config.section import Positive, Section
from megatron_opsd.config.sections import (
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    EvaluateConfig,
    GuardsConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RolloutConfig,
    TeacherConfig,
    TimeoutsConfig,
    TrainConfig,
)

__all__ = [
    "ANSWER_TEMPLATE",
    "STUDENT_TEMPLATE",
    "TEACHER_TEMPLATE",
    "CheckpointConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "GrpoConfig",
    "GuardsConfig",
    "LoggingConfig",
    "MethodConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OpsdConfig",
    "OptimConfig",
    "ParallelConfig",
    "Positive",
    "PromptsConfig",
    "Reads",
    "RolloutConfig",
    "Section",
    "SftConfig",
    "StarConfig",
    "TeacherConfig",
    "TimeoutsConfig",
    "TrainConfig",
]


class Config(Section):
    model: ModelConfig
    """[model]"""
    data: DataConfig
    """[data]"""
    method: MethodConfig = OpsdConfig()
    """[method]"""
    teacher: TeacherConfig = TeacherConfig()
    """[teacher]"""
    parallel: ParallelConfig = ParallelConfig()
    """[parallel]"""
    prompts: PromptsConfig = PromptsConfig()
    """[prompts]"""
    rollout: RolloutConfig = RolloutConfig()
    """[rollout]"""
    objective: ObjectiveConfig = ObjectiveConfig()
    """[objective]"""
    optim: OptimConfig = OptimConfig()
    """[optim]"""
    train: TrainConfig = TrainConfig()
    """[train]"""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """[checkpoint]"""
    guards: GuardsConfig = GuardsConfig()
    """[guards]"""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """[timeouts]"""
    logging: LoggingConfig = LoggingConfig()
    """[logging]"""
    evaluate: EvaluateConfig = EvaluateConfig()
    """[evaluate]"""

    @property
    def needs_engine(self) -> bool:
        """Whether the run writes responses: in its steps, before the first one, or for evaluations."""
        return self.method.samples_responses or self.evaluate.interval > 0

    @property
    def teacher_kind(self) -> Literal["frozen", "live", "ema"] | None:
        """The teacher of a method that has one."""
        return self.teacher.kind if self.method.has_teacher else None

    @property
    def reads(self) -> Reads:
        """What a row of the data must have."""
        needs_answer = self.train.curriculum is not None and self.method.reads == "problem"
        return "answer" if needs_answer else self.method.reads

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response that is learned from."""
        own = self.method.samples_responses
        return self.rollout.max_response_tokens if own else self.data.max_solution_tokens

    @property
    def problems_per_step(self) -> int:
        """Problems that a step draws."""
        return self.train.global_batch_size // self.rollout.samples_per_prompt

    @property
    def reads_grades(self) -> bool:
        """Whether it matters for the training which responses are right."""
        return self.method.reads_grades or self.train.curriculum is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, samples = self.train.global_batch_size, self.rollout.samples_per_prompt
        if size % samples:
            raise ValueError(f"rollout.samples_per_prompt = {samples} does not divide train.global_batch_size = {size}")
        if size % self.train.micro_batch_size:
            micro = self.train.micro_batch_size
            raise ValueError(f"train.micro_batch_size = {micro} does not divide train.global_batch_size = {size}")
        self._check_lengths()
        self._check_method()
        if self.evaluate.interval and not self.evaluate.data:
            raise ValueError(
                "evaluate.interval is on but evaluate.data.path is missing; set it or evaluate.interval = 0"
            )
        return self

    def _check_lengths(self) -> None:
        """Refuse lengths with which no token would be trained on, or every step would be beyond a guard."""
        skip, limit = self.prompts.skip_first_tokens, self.longest_response
        name = "rollout.max_response_tokens" if self.method.samples_responses else "data.max_solution_tokens"
        if skip >= limit:
            raise ValueError(
                f"prompts.skip_first_tokens = {skip} leaves nothing of {name} = {limit} to train on; lower it"
            )
        shortest = self.guards.min_response_length
        if shortest is not None and shortest > limit:
            raise ValueError(
                f"guards.min_response_length = {shortest:g} exceeds {name} = {limit}, so that every step is beyond it; "
                "lower it"
            )

    def _check_method(self) -> None:
        """Refuse combinations that could teach nothing, or not what they say."""
        method, samples = self.method, self.rollout.samples_per_prompt
        kind = f"method.kind = {method.kind!r}"
        if not method.has_teacher and self.teacher != TeacherConfig():
            raise ValueError(f"{kind} has no teacher; remove the settings of [teacher]")
        if not method.samples_responses and samples > 1:
            raise ValueError(f"{kind} samples nothing here; remove rollout.samples_per_prompt")
        if isinstance(method, GrpoConfig) and samples == 1:
            raise ValueError(f"{kind} compares responses to one problem; set rollout.samples_per_prompt to 2 or more")
        if isinstance(method, OpsdConfig):
            self._check_opsd(method)
        if self.teacher.kind == "live" and self.teacher.placement == "offload":
            raise ValueError("teacher.kind = 'live' has no weights of its own; remove teacher.placement")
        if not (method.has_teacher or method.samples_tokens) and self.objective.temperature != 1:
            raise ValueError(
                f"{kind} learns log-likelihoods, which objective.temperature = {self.objective.temperature:g} would "
                "change; set it to 1.0"
            )
        if samples > 1 and self.rollout.temperature == 0:
            raise ValueError(
                f"rollout.temperature = 0 writes the same response {samples} times; raise it, or set "
                "rollout.samples_per_prompt = 1"
            )
        self._check_sampling(method)
        if self.train.curriculum is not None and not method.writes_rollouts:
            raise ValueError(f"{kind}: train.curriculum goes by the student's answers, and it writes none; remove it")
        if self.train.curriculum is None and self.data.difficulty_column is not None:
            raise ValueError("data.difficulty_column is for train.curriculum; set train.curriculum.window or remove it")
        if self.objective.entropy_share < 1 and self.objective.normalization == "sequence":
            raise ValueError(
                "objective.entropy_share needs objective.normalization = 'token' or 'constant': which of a sequence's "
                "tokens are kept is not known before its loss is computed"
            )

    def _check_opsd(self, method: OpsdConfig) -> None:
        samples = self.rollout.samples_per_prompt
        if method.context == "shuffled" and self.train.global_batch_size == samples:
            raise ValueError("method.context = 'shuffled' needs two problems a step; raise train.global_batch_size")
        if method.context == "sibling" and samples == 1:
            raise ValueError(
                "method.context = 'sibling' shows another response to the same problem; set rollout.samples_per_prompt "
                "to 2 or more"
            )
        if method.context != "sibling" and method.no_sibling != "solution":
            raise ValueError("method.no_sibling is for method.context = 'sibling'; remove it")
        if self.teacher.kind != "frozen" and method.context == "nothing":
            raise ValueError(
                f"teacher.kind = '{self.teacher.kind}' with method.context = 'nothing' compares the student with "
                "itself; change one"
            )
        if not method.train_on:
            raise ValueError("method.train_on = []: nothing would be learned; name a grade")

    def _check_sampling(self, method: MethodConfig) -> None:
        """Policy gradients are of the distribution that was sampled from."""
        rollout, objective = self.rollout, self.objective
        sampled = "method.loss = 'sampled_token'" if isinstance(method, OpsdConfig) else "method.kind = 'grpo'"
        unit = objective.temperature == rollout.temperature == 1
        if objective.importance_cap is not None and not (method.samples_tokens and unit):
            raise ValueError(
                "objective.importance_cap needs method.loss = 'sampled_token' or method.kind = 'grpo', and "
                "objective.temperature = rollout.temperature = 1.0, the temperature of vLLM's log-probs; remove it"
            )
        same = rollout.temperature == objective.temperature and rollout.top_p == 1 and rollout.top_k == -1
        if method.samples_tokens and not (same or objective.allow_biased_sampling):
            raise ValueError(
                f"{sampled} is biased unless responses come from the distribution that learns; set "
                f"rollout.temperature = {objective.temperature}, rollout.top_p = 1.0 and rollout.top_k = -1, or "
                "objective.allow_biased_sampling = true"
            )
