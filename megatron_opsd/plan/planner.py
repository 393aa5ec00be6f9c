"""Plans a run: memory of every stage in every phase of a step, the shape of the batch, and what checkpoints ask for."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_opsd.config import Config
from megatron_opsd.plan import formulas
from megatron_opsd.plan.formulas import ELEMENT, GIB
from megatron_opsd.plan.preflight import check_batch, check_parallel, check_rollout_parallel
from megatron_opsd.plan.shards import RankBytes, rank_bytes, stage_layers, stage_parameters
from megatron_opsd.plan.storage import SaveMemory, most_checkpoints, save_memory, write_speed
from megatron_opsd.types import Phase
from megatron_opsd.weights.architecture import Architecture, published_architecture, read_architecture
from megatron_opsd.weights.mapping import NameTable


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    gpu_memory_gib: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpu_memory(self) -> int:
        """Bytes of one GPU."""
        return round(self.gpu_memory_gib * GIB)


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage; all ranks of the stage are alike.

    parameters: elements of the student's shard, of which ``experts`` are experts'. phases: phase -> what is on the
    device -> bytes.
    """

    layers: int
    parameters: int
    experts: int
    phases: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        return max(Phase, key=self.totals.__getitem__)

    @property
    def peak(self) -> int:
        return self.totals[self.peak_phase]


@dataclass(frozen=True)
class Batch:
    """How a step's batch is divided. Lengths are upper bounds in tokens."""

    global_batch_size: int
    data_parallel_size: int
    expert_data_parallel_size: int
    microbatches: int
    micro_batch_size: int
    student_length: int
    teacher_length: int


@dataclass(frozen=True)
class Rollout:
    """One of vLLM's ranks; zeros where the run has none.

    ``kv_cache`` is what gpu_memory_utilization leaves for it, in bytes; it may be negative.
    """

    engines: int
    tensor_model_parallel_size: int
    weights: int
    activations: int
    kv_cache: int
    kv_cache_per_token: int
    longest_sequence: int

    @property
    def kv_tokens(self) -> int:
        return max(0, self.kv_cache // self.kv_cache_per_token)

    @property
    def least_kv_cache(self) -> int:
        """Bytes for one sequence of the greatest length. With less, vLLM does not start."""
        return self.kv_cache_per_token * self.longest_sequence


@dataclass(frozen=True)
class Plan:
    model: str
    is_published: bool  # found by its name, because model.path has no config.json on this machine
    cluster: Cluster
    total_parameters: int
    batch: Batch
    rollout: Rollout
    stages: list[Stage]
    checkpoint: int  # bytes on disk
    hf_export: int
    most_checkpoints: int  # on disk at once, the one being written among them
    write_speed: float  # bytes a second that a save within checkpoint.signal_lead_seconds asks for
    pinned_host_memory: int  # bytes a node, for what is offloaded
    save_memory: SaveMemory

    @property
    def fullest(self) -> int:
        """The stage with the highest peak."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].peak)

    @property
    def shortfall(self) -> int:
        """Bytes that a rank's memory or its KV cache is too small by; not positive if the plan fits."""
        kv_missing = self.rollout.least_kv_cache - self.rollout.kv_cache
        return max(self.stages[self.fullest].peak - self.cluster.gpu_memory, kv_missing)

    @property
    def least_shortfall(self) -> int:
        """The shortfall with the smallest KV cache that vLLM starts with."""
        spare = max(0, self.rollout.kv_cache) - self.rollout.least_kv_cache
        totals = [
            total - (spare if phase == "rollout" else 0)
            for stage in self.stages
            for phase, total in stage.totals.items()
        ]
        return max(totals) - self.cluster.gpu_memory

    @property
    def fits(self) -> bool:
        return self.shortfall <= 0

    @property
    def disk(self) -> int:
        """Bytes on disk at most."""
        return self.most_checkpoints * self.checkpoint + self.hf_export


def find_architecture(path: str) -> tuple[Architecture, bool]:
    """The architecture of model.path, and whether it was found by its name because there is no config.json.

    Raises:
        UserError: ``path`` is neither a directory with a usable config.json nor the name of a published model.
    """
    if (Path(path) / "config.json").is_file():
        return read_architecture(path), False
    return published_architecture(path), True


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """Plan a run.

    Raises:
        UserError: the model is unknown, or the layout or the batch does not fit the model or the number of ranks.
    """
    arch, is_published = find_architecture(config.model.path)
    if config.needs_engine:
        check_rollout_parallel(config, arch, cluster.world_size)
    check_parallel(config, arch, cluster.world_size)
    check_batch(config, cluster.world_size)
    layout, train = config.parallel, config.train
    ranks_of_a_stage = cluster.world_size // layout.pipeline_model_parallel_size
    dp = ranks_of_a_stage // layout.tensor_model_parallel_size
    lengths = formulas.longest_sequences(config)
    batch = Batch(
        global_batch_size=train.global_batch_size,
        data_parallel_size=dp,
        expert_data_parallel_size=ranks_of_a_stage // layout.expert_model_parallel_size if arch.moe else dp,
        microbatches=train.global_batch_size // (dp * train.micro_batch_size),
        micro_batch_size=train.micro_batch_size,
        student_length=lengths.student,
        teacher_length=lengths.teacher,
    )
    rollout = _rollout(config, arch, cluster, lengths.rollout)
    stages, offloaded = _stages(config, arch, cluster, batch, rollout)
    tensors = NameTable(arch).hf_tensors()
    total = sum(prod(shape) for shape in tensors.values())
    rows = arch.padded_vocab_size(layout.tensor_model_parallel_size) - arch.vocab_size
    tables = 1 if arch.share_embeddings_and_output_weights else 2
    element = ELEMENT[config.model.dtype]
    written = element + 12 + (4 if config.teacher_kind == "ema" else 0)  # bytes of a parameter in a checkpoint
    checkpoint = written * (total + rows * tables * arch.hidden_size)
    return Plan(
        model=Path(config.model.path).name,
        is_published=is_published,
        cluster=cluster,
        total_parameters=total,
        batch=batch,
        rollout=rollout,
        stages=stages,
        checkpoint=checkpoint,
        hf_export=element * total if config.checkpoint.export_hf else 0,
        most_checkpoints=most_checkpoints(config),
        write_speed=write_speed(config, checkpoint),
        pinned_host_memory=max(offloaded) * cluster.gpus_per_node,
        save_memory=save_memory(
            layout,
            cluster.gpus_per_node,
            [(stage.parameters - stage.experts, stage.experts) for stage in stages],
            ranks_of_a_stage,
            written,
            config.optim.use_distributed_optimizer,
        ),
    )


def _rollout(config: Config, arch: Architecture, cluster: Cluster, longest: int) -> Rollout:
    size = config.rollout.tensor_model_parallel_size
    if not config.needs_engine:
        return Rollout(0, size, 0, 0, 0, kv_cache_per_token=1, longest_sequence=0)
    weights, activations = formulas.vllm_weights(config, arch), formulas.vllm_activations(config, arch)
    budget = round(config.rollout.gpu_memory_utilization * cluster.gpu_memory)
    return Rollout(
        engines=cluster.world_size // size,
        tensor_model_parallel_size=size,
        weights=weights,
        activations=activations,
        kv_cache=budget - weights - activations,
        kv_cache_per_token=formulas.kv_bytes_per_token(config, arch),
        longest_sequence=longest,
    )


def _stages(
    config: Config, arch: Architecture, cluster: Cluster, batch: Batch, rollout: Rollout
) -> tuple[list[Stage], list[int]]:
    """The stages, and the bytes that each one offloads to the host if the configuration says so."""
    layers = stage_layers(arch, config.model, config.parallel)
    last = len(layers) - 1
    model = config.model.model_copy(update={"recompute": "none"})  # parameters are the same, and built once
    stages, offloaded = [], []
    for stage, count in enumerate(layers):
        # Stages between the first and the last are alike if they have as many layers: build one for all of them.
        alike = stage if stage in (0, last) else 1 + layers[1:last].index(count)
        parameters = stage_parameters(
            arch,
            model,  # pyright: ignore[reportArgumentType]  # pydantic's frozen models have hashes
            config.parallel,  # pyright: ignore[reportArgumentType]
            cluster.world_size,
            alike,
        )
        kept = rank_bytes(
            parameters,
            ELEMENT[config.model.dtype],
            config.optim.use_distributed_optimizer,
            batch.data_parallel_size,
            batch.expert_data_parallel_size,
            stage == last,
            config.teacher_kind,
        )
        phases = _phases(config, arch, batch, rollout, kept, stage, layers)
        experts = sum(parameter.numel for parameter in parameters if parameter.is_expert)
        stages.append(Stage(count, sum(parameter.numel for parameter in parameters), experts, phases))
        offloads = config.teacher.placement == "offload"
        teacher = kept.teacher - kept.teacher_head + kept.average if offloads else 0
        offloaded.append(teacher + (kept.optimizer if config.optim.placement == "offload" else 0))
    return stages, offloaded


def _phases(
    config: Config, arch: Architecture, batch: Batch, rollout: Rollout, kept: RankBytes, stage: int, layers: list[int]
) -> dict[str, dict[str, int]]:
    """What is on the device while each phase runs. Zeros are left out.

    vLLM's engine is awake in the rollout, and in the refit only its weights are. The student's weights always stay; its
    gradients and optimizer states leave if optim.placement = offload. The teacher's hidden states stay until the step
    ends.
    """
    is_last = stage == len(layers) - 1
    b = batch.micro_batch_size
    student, teacher = b * batch.student_length, b * batch.teacher_length
    responses = batch.global_batch_size // batch.data_parallel_size * config.longest_response  # of a step
    response = min(responses, student if config.train.packing else b * config.longest_response)
    gradients, states = {"gradients": kept.gradients}, {"optimizer states": kept.optimizer}
    optional = gradients | states
    training = {"student weights": kept.weights} | ({} if config.optim.placement == "offload" else optional)
    offloads = config.teacher.placement == "offload"
    cache = responses * arch.hidden_size * ELEMENT[config.model.dtype] if is_last else 0
    always = training | (
        {"teacher weights": kept.teacher_head}
        if offloads
        else {"teacher weights": kept.teacher, "teacher's average": kept.average}
    )
    after = always | ({"teacher's hidden states": cache} if config.teacher_kind else {})
    phases: dict[str, dict[str, int]] = {
        "rollout": always
        | {
            "vLLM weights": rollout.weights,
            "vLLM KV cache": max(0, rollout.kv_cache),
            "vLLM activations": rollout.activations,
        },
        "teacher": after
        | {
            "teacher weights": kept.teacher,
            "activations": formulas.teacher_activations(config, arch, teacher) if config.teacher_kind else 0,
        },
        "student": after
        | gradients
        | formulas.student_activations(config, arch, layers[stage], stage, student, batch.microbatches)
        | (formulas.loss(config, arch, student, response) if is_last else {}),
        "optimizer": after | optional,
        "refit": after
        | {
            "vLLM weights": rollout.weights,
            "refit buckets": formulas.refit_staging(config, arch) if config.needs_engine else 0,
        },
    }
    reserved = {"CUDA and NCCL (assumed)": formulas.RESERVED}
    return {phase: {name: n for name, n in (parts | reserved).items() if n} for phase, parts in phases.items()}
