"""The sections that need few words; method.py and prompts.py have the others."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_opsd.config.section import BaseURL, Fraction, Minutes, NonNegative, Place, Positive, Section


class ModelConfig(Section):
    path: Place
    """Hugging Face directory of the model: config.json, safetensors, tokenizer. Student and teacher start here."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters and activations. Gradients and optimizer states are float32 either way."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps one activation a layer and computes the rest again in the backward pass."""


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
    """Column with the worked reference solution, which the student does not see (`sft` learns to write it)."""
    answer_column: str | None = None
    """Column with the final answer. Without one it is read from the solution (last \\boxed{}, or `#### 72`)."""
    difficulty_column: str | None = None
    """Column with a number for train.curriculum, higher for harder problems."""
    max_problem_tokens: Positive = 2048
    """Rows with a longer problem are dropped and counted."""
    max_solution_tokens: Positive = 8192
    """Rows with a longer solution are dropped and counted."""


class RolloutConfig(Section):
    engine: Literal["colocated", "server"] = "colocated"
    """`colocated` takes turns with training on its GPUs; `server` asks `rollout.servers`, on other nodes as a rule."""
    servers: list[BaseURL] = []  # noqa: RUF012 - pydantic copies it
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
    normalization: Literal["token", "sequence", "constant"] = "token"
    """Mean over all response tokens of the global batch; mean of the sequences' means; or `constant`, mean of the
    sequences' sums over the longest response that the limits allow."""
    position_weights: Literal["even", "rising", "falling"] = "even"
    """Weigh a response's tokens by their place: `even`, or linearly `rising` or `falling` with mean 1."""
    entropy_share: Fraction = 1.0
    """Learn only from this share of the tokens: those of which the student is least sure. Which entropy is enough comes
    from the step before; the first step keeps all. The mean is over what is kept (`constant`: as without)."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """For policy gradients: weigh each token by the student's probability over vLLM's, capped here. Off by default."""
    allow_biased_sampling: bool = False
    """Let a policy gradient learn from responses that were sampled from another distribution than its own."""
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


class CurriculumConfig(Section):
    window: Fraction = 0.25
    """Share of the problems, the easiest ones, that steps draw from at first. Off unless a setting of train.curriculum
    is given. Easy: low data.difficulty_column, or else a high share of right responses so far (at first, the file's
    order)."""
    growth: Fraction = 0.25
    """How much the window grows, as a share of all problems."""
    accuracy: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """The window grows where the share of right responses, in a mean of five steps, exceeds this."""


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
    curriculum: CurriculumConfig | None = None
    """Easy problems first ([train.curriculum]): by data.difficulty_column, or by the student's measured pass rates."""


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
    the checkpoint. Changed data, or another seed, begin a new order of the problems. Responses that `distill` has kept
    in the run's folder must still have been written with its settings."""
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
