"""A layout for settings that do not divide: full plans of layouts that do, smallest first, until one fits."""

from math import gcd, lcm, log2, prod

from megatron_opsd.config import Config
from megatron_opsd.errors import UserError
from megatron_opsd.plan.formulas import ELEMENT, RESERVED, vllm_weights
from megatron_opsd.plan.planner import Cluster, make_plan
from megatron_opsd.plan.remedies import Changes, apply, find_remedies, with_utilization
from megatron_opsd.weights.architecture import Architecture
from megatron_opsd.weights.mapping import NameTable

FREE = 0.05  # of a GPU's memory is to remain, if any layout leaves so much


def find_layout(config: Config, arch: Architecture, cluster: Cluster) -> tuple[Changes, bool] | None:
    """Settings with which layout and batch divide, and whether they fit; none if nothing divides.

    Of the layouts that fit it is the one in which the fewest ranks share the model, then the one nearest to ``config``:
    with room to spare and vLLM as configured, if there is one, otherwise with the share of memory or the
    tensor-parallel size that vLLM needs. If none fits, remedies are added to the one that needs the least memory.
    """
    engines = _engine_sizes(config, arch, cluster)
    layouts = [layout | engines[0] for layout in _layouts(config, arch, cluster)]
    found = _first_that_fits(config, arch, cluster, layouts, as_configured=True)
    if not found:
        others = [layout | engine for layout in layouts for engine in engines]
        found = _first_that_fits(config, arch, cluster, others, as_configured=False)
    if found:
        return _differing(config, found), True
    for changes in sorted(
        layouts, key=lambda layout: _least_memory(config, arch, cluster, layout, as_configured=False)
    ):
        try:
            remedies = find_remedies(*apply(config, cluster, changes))
        except UserError:  # something else is wrong with the settings
            continue
        fits = bool(remedies) and remedies[0].plan.fits
        return _differing(config, changes | (remedies[0].changes if fits else {})), fits
    return None


def _first_that_fits(
    config: Config, arch: Architecture, cluster: Cluster, candidates: list[Changes], as_configured: bool
) -> Changes | None:
    """as_configured: vLLM's share of memory is that of ``config``, and ``FREE`` of the memory remains."""
    spare = FREE * cluster.gpu_memory if as_configured else 0
    for changes in candidates:
        if _least_memory(config, arch, cluster, changes, as_configured) > cluster.gpu_memory:
            continue
        if not as_configured:
            changes = with_utilization(config, cluster, changes)
        try:
            if make_plan(*apply(config, cluster, changes)).shortfall <= -spare:
                return changes
        except UserError:  # something else is wrong with the settings, or with this layout
            continue
    return None


def _layouts(config: Config, arch: Architecture, cluster: Cluster) -> list[Changes]:
    """Those whose sizes divide the cluster and the model, in the order of preference."""
    given, world = config.parallel, cluster.world_size
    heads = gcd(arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size if arch.moe is None else 0)
    sizes = [
        (tp, pp, ep)
        for tp in _divisors(gcd(cluster.gpus_per_node, heads))
        for pp in _divisors(world // tp)
        for ep in _divisors(gcd(world // pp, arch.moe.num_moe_experts) if arch.moe else 1)
        if pp <= arch.num_layers
    ]
    asked = (
        given.tensor_model_parallel_size,
        given.pipeline_model_parallel_size,
        given.expert_model_parallel_size if arch.moe else 1,
    )
    sizes.sort(key=lambda layout: (layout[0] * layout[1], _distance(layout, asked), -layout[0]))
    return [
        {
            "parallel.tensor_model_parallel_size": tp,
            "parallel.pipeline_model_parallel_size": pp,
            "parallel.expert_model_parallel_size": ep,
            "parallel.sequence_parallel": tp > 1,
            **_batch(config, world // (tp * pp)),
        }
        for tp, pp, ep in sizes
    ]


def _engine_sizes(config: Config, arch: Architecture, cluster: Cluster) -> list[Changes]:
    """vLLM's tensor-parallel sizes that divide the cluster and the model, the nearest to the configured one first."""
    if not config.needs_engine:
        return [{}]
    name, given = "rollout.tensor_model_parallel_size", config.rollout.tensor_model_parallel_size
    most = gcd(cluster.world_size, arch.num_attention_heads, arch.moe.moe_ffn_hidden_size if arch.moe else 0)
    return [{name: size} for size in sorted(_divisors(most), key=lambda size: _distance((size,), (given,)))]


def _batch(config: Config, data_parallel: int) -> Changes:
    """Batch sizes that divide. A step learns from as many sequences as configured, or nearly so."""
    unit = lcm(data_parallel, config.rollout.samples_per_prompt)
    size = unit * max(1, round(config.train.global_batch_size / unit))
    micro = gcd(size // data_parallel, config.train.micro_batch_size)
    return {"train.global_batch_size": size, "train.micro_batch_size": micro}


def _least_memory(config: Config, arch: Architecture, cluster: Cluster, changes: Changes, as_configured: bool) -> float:
    """What the mean rank needs in the rollout at least. Tells without a plan that most layouts do not fit."""
    element = ELEMENT[config.model.dtype]
    sizes = {name: prod(shape) for name, shape in NameTable(arch).hf_tensors().items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    tp, pp, ep = (changes[f"parallel.{kind}_model_parallel_size"] for kind in ("tensor", "pipeline", "expert"))
    own = (total - experts) / (tp * pp) + experts / (ep * pp)
    needed = element * own + RESERVED
    if config.optim.placement == "resident":
        needed += 4 * own + (8 if element == 4 else 12) * total / cluster.world_size
    if config.teacher_kind in ("frozen", "ema") and config.teacher.placement == "resident":
        needed += element * own
    if not config.needs_engine:
        return needed
    if as_configured:
        return needed + config.rollout.gpu_memory_utilization * cluster.gpu_memory
    size = changes["rollout.tensor_model_parallel_size"]
    return needed + vllm_weights(apply(config, cluster, {"rollout.tensor_model_parallel_size": size})[0], arch)


def _differing(config: Config, changes: Changes) -> Changes:
    """Those that the configuration does not say already, and the nodes."""
    sections = config.model_dump()
    given = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    return {name: value for name, value in changes.items() if name == "nodes" or given[name] != value}


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _distance(sizes: tuple[int, ...], others: tuple[int, ...]) -> float:
    """How many doublings and halvings lead from one to the other."""
    return sum(abs(log2(size / other)) for size, other in zip(sizes, others, strict=True))
