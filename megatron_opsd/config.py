"""The whole configuration of a run: one frozen, strict schema. config_file.py reads it from TOML.

The string under each field is its ``--help``. What can be said of settings without a model or a cluster is checked
here, by validators whose errors name the settings; the rest is plan/preflight.py's.
"""

import os
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from megatron_opsd.types import Grade

# The wording of the prompts. Here because it is configuration; prompts.py turns it into token ids.
_CLOSING = r"Please reason step by step, and put your final answer within \boxed{}."

STUDENT_TEMPLATE = "Problem: {problem}\n\n" + _CLOSING

TEACHER_TEMPLATE = (
    "Problem: {problem}\n\n"
    "The following solution is known to be correct.\n\n"
    "--- begin solution ---\n"
    "{solution}\n"
    "--- end solution ---\n\n"
    "Make sure you understand every step of it. Then derive the answer yourself, in your own words, as if you had "
    "not been shown the solution.\n\n" + _CLOSING
)

ANSWER_TEMPLATE = (
    "Problem: {problem}\n\n"
    "The final answer is known to be {answer}. Derive it yourself, in your own words, as if you had not been told.\n\n"
    + _CLOSING
)

Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Minutes = Annotated[float, Field(gt=0, le=525_600)]  # a year
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


def _check_base_url(url: str) -> str:
    if not _is_base_url(url):
        raise ValueError(f"rollout.servers = {url!r}: must be the URL of a server, such as http://127.0.0.1:8000")
    return url


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port is not None
    except ValueError:  # a port that is none
        return False
    more = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    return parts.scheme in ("http", "https") and named and not more


BaseURL = Annotated[str, AfterValidator(_check_base_url)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    path: Place
    """Hugging Face directory of the model: config.json, safetensors, tokenizer. Student and teacher start here."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters and activations. Gradients and optimizer states are float32 either way."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps one activation a layer and computes the rest again in the backward pass."""


Reads = Literal["problem", "answer", "solution"]  # what a row of the data must have; each includes the problem


class OpsdConfig(Section):
    has_teacher: ClassVar[bool] = True
    writes_rollouts: ClassVar[bool] = True  # whether the engine writes responses in every step
    kind: Literal["opsd"] = "opsd"
    """The method: `opsd`, On-Policy Self-Distillation, or `sft`, fine-tuning on the data's solutions."""
    loss: Literal["divergence", "sampled_token"] = "divergence"
    """`divergence` compares whole distributions ([objective]); `sampled_token` is the policy gradient of the sampled
    tokens, with log q - log p as their advantages."""
    context: Literal["solution", "answer", "shuffled", "nothing"] = "solution"
    """What the teacher sees besides the problem: the reference solution, or its final answer alone. Controls:
    `shuffled`, another problem's solution; `nothing`, the student's prompt."""
    train_on: list[Annotated[Grade, Field(strict=False)]] = list(Grade)
    """Which responses are learned from. `unfinished` ones were cut at the limit; `unknown`: the data has no answer."""

    @property
    def reads(self) -> Reads:
        if self.context in ("solution", "shuffled"):
            return "solution"
        return "answer" if self.context == "answer" or Grade.UNKNOWN not in self.train_on else "problem"


class SftConfig(Section):
    has_teacher: ClassVar[bool] = False
    writes_rollouts: ClassVar[bool] = False
    kind: Literal["sft"] = "sft"
    """The method: `opsd`, On-Policy Self-Distillation, or `sft`, fine-tuning on the data's solutions."""

    @property
    def reads(self) -> Reads:
        return "solution"


def _method_kind(method: Any) -> Any:
    return method.get("kind", "opsd") if isinstance(method, dict) else getattr(method, "kind", None)


MethodConfig = Annotated[
    Annotated[OpsdConfig, Tag("opsd")] | Annotated[SftConfig, Tag("sft")], Discriminator(_method_kind)
]


class TeacherConfig(Section):
    kind: Literal["frozen", "live", "ema"] = "frozen"
    """`frozen`: the model the run starts from. `live`: the student itself, without a copy. `ema`: an exponential moving
    average of the student."""
    ema_decay: Annotated[float, Field(gt=0, le=0.9999)] = 0.999
    """How much of an `ema` teacher's weights stays in each step. Float32 holds no slower average than 0.9999."""
    placement: Literal["resident", "offload"] = "resident"
    """`offload` keeps the teacher's weights in pinned host memory while it is not scoring; its LM head stays."""


class ParallelConfig(Section):
    tensor_model_parallel_size: Positive = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: Positive = 1
    """Ranks that share the layers. What remains of the world size is data parallel."""
    expert_model_parallel_size: Positive = 1
    """Ranks that share each layer's experts, in models that have them: tensor- and data-parallel ranks side by side."""
    sequence_parallel: bool = False
    """Also split the norms' activations over the tensor-parallel ranks."""
    timeout_minutes: Annotated[int, Field(gt=0, le=525_600)] = 120
    """A collective that waits longer than this ends the run. Those of [timeouts] say more, if they strike first."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1")
        return self


class DataConfig(Section):
    path: Place
    """JSONL, JSON or parquet file, or a dataset's id on the Hugging Face hub."""
    subset: str | None = None
    """Configuration of a dataset from the hub, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a dataset from the hub."""
    problem_column: str = "problem"
    """Column with the problem."""
    solution_column: str = "solution"
    """Column with the worked reference solution, which only the teacher sees."""
    answer_column: str | None = None
    """Column with the final answer. Without one it is read from the solution (last \\boxed{}, or `#### 72`)."""
    max_problem_tokens: Positive = 2048
    """Rows with a longer problem are dropped and counted."""
    max_solution_tokens: Positive = 8192
    """Rows with a longer solution are dropped and counted."""


class PromptsConfig(Section):
    student_template: str = STUDENT_TEMPLATE
    """The student's user turn; {problem} is replaced."""
    teacher_template: str = TEACHER_TEMPLATE
    """The teacher's user turn; {problem} and {solution} are replaced."""
    answer_template: str = ANSWER_TEMPLATE
    """The teacher's user turn with method.context = `answer`; {problem} and {answer} are replaced."""
    student_thinking: bool = False
    """`enable_thinking` of the student's chat template."""
    teacher_thinking: bool = True
    """`enable_thinking` of the teacher's chat template."""
    teacher_prefix: str = ""
    """Text put between the teacher's prompt and the response, such as an empty think block.

    With the student's thinking off and the teacher's on, a Qwen3 teacher expects `<think>` where the response starts:
    a prefix of `<think>\\n`, or skip_first_tokens, keeps the student from learning that."""
    skip_first_tokens: NonNegative = 0
    """Response tokens at the start that are not trained on."""


class RolloutConfig(Section):
    engine: Literal["colocated", "server"] = "colocated"
    """`colocated` takes turns with training on its GPUs; `server` asks `rollout.servers`, on other nodes as a rule."""
    servers: list[BaseURL] = []
    """The servers of engine `server`, such as http://127.0.0.1:8000; each was started with `opsd serve`."""
    tensor_model_parallel_size: Positive = 1
    """vLLM's tensor-parallel size: any divisor of the world size, whatever Megatron's layout; or that of a server."""
    max_response_tokens: Positive = 1024
    """The student's answer is cut here."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.1
    """Sampling temperature of the training rollouts."""
    top_p: Fraction = 0.95
    """Nucleus sampling: the smallest set of tokens with this probability."""
    top_k: Annotated[int, Field(ge=-1)] = 20
    """Sample among this many tokens; -1 for all."""
    samples_per_prompt: Positive = 1
    """Answers to each problem in a step."""
    gpu_memory_utilization: Fraction = 0.5
    """Share of the GPU that vLLM may use (weights and KV cache); a server may have more, such as 0.9."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """KV cache of each rank, or of a server's process, on CPU, in GiB. On a GPU gpu_memory_utilization decides."""
    max_num_seqs: Positive = 256
    """Sequences that vLLM decodes at once."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs. CPU always does."""
    refit_bucket_mib: Annotated[float, Field(gt=0)] = 512
    """Weights travel to vLLM in buckets of this size."""
    refit_verify_interval: NonNegative = 1
    """Steps between refits whose tensors are compared by checksum; 0 for none. Log-probs are compared at every step."""
    refit_max_logprob_gap: Annotated[float, Field(gt=0)] | None = None
    """Largest mean difference of vLLM's and Megatron's log-probs. Default: 1e-4 for float32, 0.05 for bfloat16."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        twice = [url for i, url in enumerate(self.servers) if url in self.servers[:i]]
        if twice:
            raise ValueError(f"rollout.servers = {twice[0]!r}: is listed twice; remove one")
        return self


class ObjectiveConfig(Section):
    kind: Literal["jsd", "forward_kl", "reverse_kl", "skewed_kl"] = "forward_kl"
    """The divergence between the teacher's and the student's next-token distributions. The recipes and the quick start
    have this default, and that of clip_mode and clip: docs/numerics.md says why."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's weight in the mixture of `jsd` and `skewed_kl`."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Both distributions are softmax(logits / temperature)."""
    clip_mode: Literal["none", "entry", "token", "saturate"] = "saturate"
    """What is clipped: nothing, each vocabulary entry (the paper), the token's sum, or each entry softly. See
    docs/numerics.md and docs/evidence.md."""
    clip: Annotated[float, Field(gt=0)] = 0.05
    """Size of the clip; 0.2 suits `entry` with jsd, 0.5 `token`."""
    normalization: Literal["token", "sequence"] = "token"
    """Mean over all response tokens of the global batch, or mean of the sequences' means."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """For loss `sampled_token`: weigh each token by the student's probability over vLLM's, capped here. Off by
    default."""
    allow_biased_sampling: bool = False
    """Let loss `sampled_token` learn from responses that were sampled from another distribution than its own."""
    chunk_size: Positive = 2048
    """Tokens whose logits exist at one time."""


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate. The paper's 5e-6 is for LoRA; full-parameter runs want less."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegative = 5
    """Steps of linear warm-up."""
    decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up, over train.steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    adam_eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Adam's denominator offset."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 to leave it alone."""
    dither: bool = True
    """Start a bfloat16 model's float32 parameters at random places among the numbers that round to its weights, so that
    the weights follow small steps from the first one on."""
    placement: Literal["resident", "offload"] = "resident"
    """`offload` keeps the optimizer's states in pinned host memory outside of its step, and frees the gradients until
    the student's pass. Needs use_distributed_optimizer."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's states over the data-parallel ranks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.placement == "offload" and not self.use_distributed_optimizer:
            raise ValueError("optim.placement = 'offload' needs optim.use_distributed_optimizer = true; change either")
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr = {self.min_lr} exceeds optim.lr = {self.lr}; lower it")
        return self


class TrainConfig(Section):
    steps: Positive = 100
    """Optimizer steps of the run."""
    global_batch_size: Positive = 32
    """Sequences in a step, over all data-parallel ranks: problems times rollout.samples_per_prompt."""
    micro_batch_size: Positive = 1
    """Sequences a rank computes at once. With packing, their room: so many of a step's longest sequences."""
    packing: bool = False
    """Put sequences one after the other without padding; needs nemo-toolkit."""
    seed: NonNegative = 0
    """Seed of the sampler and of every rollout."""


class CheckpointConfig(Section):
    save_interval: NonNegative = 50
    """Steps between checkpoints; 0 for none. The last step is always saved unless 0."""
    keep_last: NonNegative = 2
    """Complete checkpoints to keep; 0 for all. The one of the best evaluation is kept besides."""
    keep_every: NonNegative = 0
    """Also keep the checkpoints of every so many steps; 0 for none."""
    signal_lead_seconds: Annotated[float, Field(gt=0)] = 300
    """Time between USR1 and the end of the job: the N of `sbatch --signal=B:USR1@N`. A step that does not end in time
    for the save is given up."""
    resume: Place = "never"
    """`never`, `auto` (the newest complete checkpoint of the run directory, if any) or a checkpoint's directory."""
    allow_changes: bool = False
    """Go on although [method], [teacher], [prompts], [objective], train.seed, the data or the model have changed since
    the checkpoint. Changed data, or another seed, begin a new order of the problems."""
    export_hf: bool = True
    """Write the trained model as a Hugging Face directory at the end."""


class GuardsConfig(Section):
    max_skipped_steps: NonNegative = 3
    """A step whose loss or gradient is not finite leaves the weights alone; more than so many in a row end the run."""
    min_entropy: Annotated[float, Field(ge=0)] | None = None
    """Lowest mean entropy of the student's next-token distributions, in nats."""
    max_entropy: Annotated[float, Field(gt=0)] | None = None
    """Highest mean entropy of the student's next-token distributions, in nats."""
    min_response_length: Annotated[float, Field(gt=0)] | None = None
    """Lowest mean number of tokens of a step's responses."""
    max_response_length: Annotated[float, Field(gt=0)] | None = None
    """Highest mean number of tokens of a step's responses."""
    max_accuracy_drop: Fraction | None = None
    """How far the held-out accuracy (greedy) may fall below the best one of the run."""
    watch_learning: bool = True
    """Warn, every `patience` steps, where the student has become less sure than its teacher and no nearer to it; and
    where, in means of five steps, the loss falls while the unclipped divergence rises."""
    patience: Positive = 5
    """The first step beyond a bound warns; so many in a row end the run (of the accuracy: two evaluations)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("entropy", "response_length"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low >= high:
                raise ValueError(
                    f"guards.min_{name} = {low:g} is not below guards.max_{name} = {high:g}, so that every step is "
                    "beyond one of them; lower the first or raise the second"
                )
        return self


class TimeoutsConfig(Section):
    start: Minutes = 60
    """Minutes to load the models, start vLLM and resume, before the first step."""
    rollout: Minutes = 60
    """Minutes of a step's rollouts, which have long tails."""
    teacher: Minutes = 30
    """Minutes of a step's teacher pass."""
    student: Minutes = 30
    """Minutes of a step's student pass."""
    optimizer: Minutes = 10
    """Minutes of an optimizer step."""
    refit: Minutes = 15
    """Minutes to bring the weights into vLLM."""
    evaluate: Minutes = 120
    """Minutes of an evaluation."""
    save: Minutes = 60
    """Minutes to write a checkpoint, or to wait for one to be written, and for the export."""


class LoggingConfig(Section):
    run_dir: Place = "runs/opsd"
    """Folder for the resolved config, metrics, logs, rollouts, checkpoints and the exported model."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    rollouts_interval: NonNegative = 10
    """Steps between samples of rollouts written to run_dir/rollouts; 0 for none."""


class EvaluateConfig(Section):
    data: DataConfig | None = None
    """Problems to evaluate on ([evaluate.data], the fields of [data]). With an answer column they need no solutions."""
    interval: NonNegative = 0
    """Training steps between evaluations; 0 for none. When on, also before the first and after the last step."""
    limit: Positive | None = None
    """Only the first problems of the file."""
    samples: Positive = 1
    """Sampled answers to each problem (the k of Avg@k)."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Temperature of the sampled answers."""
    top_p: Fraction = 1.0
    """Nucleus sampling of the sampled answers."""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """Sample among this many tokens; -1 for all."""
    max_response_tokens: Positive | None = None
    """Default: rollout.max_response_tokens."""
    answer_check: Literal["math_verify", "exact"] = "math_verify"
    """How an answer is compared with the reference."""


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
        """Whether the run writes responses: in its steps, or for evaluations."""
        return self.method.writes_rollouts or self.evaluate.interval > 0

    @property
    def teacher_kind(self) -> Literal["frozen", "live", "ema"] | None:
        """The teacher of a method that has one."""
        return self.teacher.kind if self.method.has_teacher else None

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
        skip, limit = self.prompts.skip_first_tokens, self.rollout.max_response_tokens
        written, name = limit, "rollout.max_response_tokens"
        if not self.method.writes_rollouts:
            written, name = self.data.max_solution_tokens, "data.max_solution_tokens"
        if skip >= written:
            raise ValueError(
                f"prompts.skip_first_tokens = {skip} leaves nothing of {name} = {written} to train on; lower it"
            )
        shortest = self.guards.min_response_length
        if shortest is not None and shortest > limit:
            raise ValueError(
                f"guards.min_response_length = {shortest:g} exceeds rollout.max_response_tokens = {limit}, so that "
                "every step is beyond it; lower it"
            )

    def _check_method(self) -> None:
        """Refuse combinations that could teach nothing, or not what they say."""
        method, rollout, objective = self.method, self.rollout, self.objective
        if isinstance(method, SftConfig):
            if self.teacher != TeacherConfig():
                raise ValueError("method.kind = 'sft' has no teacher; remove the settings of [teacher]")
            if rollout.samples_per_prompt > 1:
                raise ValueError("method.kind = 'sft' samples nothing; remove rollout.samples_per_prompt")
        if isinstance(method, OpsdConfig):
            if method.context == "shuffled" and self.train.global_batch_size == rollout.samples_per_prompt:
                raise ValueError("method.context = 'shuffled' needs two problems a step; raise train.global_batch_size")
            if self.teacher.kind != "frozen" and method.context == "nothing":
                raise ValueError(
                    f"teacher.kind = '{self.teacher.kind}' with method.context = 'nothing' compares the student with "
                    "itself; change one"
                )
            if not method.train_on:
                raise ValueError("method.train_on = []: nothing would be learned; name a grade")
        if self.teacher.kind == "live" and self.teacher.placement == "offload":
            raise ValueError("teacher.kind = 'live' has no weights of its own; remove teacher.placement")
        sampled = isinstance(method, OpsdConfig) and method.loss == "sampled_token"
        if objective.importance_cap is not None and not (sampled and objective.temperature == 1):
            raise ValueError(
                "objective.importance_cap needs method.loss = 'sampled_token' and objective.temperature = 1.0, the "
                "temperature of vLLM's log-probs; remove it"
            )
        same = rollout.temperature == objective.temperature and rollout.top_p == 1 and rollout.top_k == -1
        if sampled and not (same or objective.allow_biased_sampling):
            raise ValueError(
                "method.loss = 'sampled_token' is biased unless responses come from the distribution that learns; set "
                f"rollout.temperature = {objective.temperature}, rollout.top_p = 1.0 and rollout.top_k = -1, or "
                "objective.allow_biased_sampling = true"
            )
