"""What to change when a run does not fit. Each remedy is a full plan with the changed settings, never a guess."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any

from pydantic import ValidationError

from megatron_opsd.config import Config
from megatron_opsd.errors import UserError
from megatron_opsd.plan.planner import Cluster, Plan, make_plan

Changes = dict[str, Any]  # dotted settings, and "nodes"


@dataclass(frozen=True)
class Remedy:
    """Settings to change, and the plan with them. ``saves``: bytes by which the shortfall decreases."""

    changes: Changes
    plan: Plan
    saves: int


def find_remedies(config: Config, cluster: Cluster) -> list[Remedy]:
    """Remedies for a plan that does not fit. Those that make it fit come first, cheapest first.

    If no single change is enough, the first remedy is a combination of changes, if there is one.
    """
    plan = make_plan(config, cluster)
    if plan.fits:
        return []
    singles = [remedy for step in _STEPS if (remedy := _try(config, cluster, plan, step(config, cluster, plan)))]
    fitting = [remedy for remedy in singles if remedy.plan.fits]
    others = [remedy for remedy in singles if not remedy.plan.fits]
    combined = _combine(config, cluster, plan) if not fitting else None
    return [*fitting, *([combined] if combined else []), *others]


def apply(config: Config, cluster: Cluster, changes: Changes) -> tuple[Config, Cluster]:
    """The configuration and cluster with ``changes``.

    Raises:
        UserError: the changed settings contradict one another.
    """
    raw = config.model_dump()
    for name, value in changes.items():
        if name != "nodes":
            section, key = name.split(".")
            raw[section][key] = value
    try:
        changed = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(str(error)) from error
    return changed, replace(cluster, nodes=changes.get("nodes", cluster.nodes))


def options(changes: Changes) -> str:
    """The changes as options of the command line."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())


def _try(config: Config, cluster: Cluster, plan: Plan, changes: Changes, least: bool = False) -> Remedy | None:
    """The changed plan, if it is possible and needs less memory. ``least``: compare with the smallest KV cache."""
    if not changes:
        return None
    try:
        changed = make_plan(*apply(config, cluster, changes))
    except UserError:  # an impossible layout or batch
        return None
    saves = plan.least_shortfall - changed.least_shortfall if least else plan.shortfall - changed.shortfall
    return Remedy(changes, changed, saves) if saves > 0 else None


def _combine(config: Config, cluster: Cluster, plan: Plan) -> Remedy | None:
    """Take the steps that help, cheapest first, until the plan fits. Then drop those that are not needed.

    The KV cache is sized last, from the memory that everything else leaves.
    """
    changes: Changes = {}
    current = plan
    for step in [*_STEPS[:-1] * 3, *[_more_nodes] * 6]:
        if current.least_shortfall <= -cluster.gpu_memory // 100:  # one step of gpu_memory_utilization
            break
        changed_config, changed_cluster = apply(config, cluster, changes)
        new = step(changed_config, changed_cluster, current)
        remedy = _try(config, cluster, current, changes | new, least=True) if new else None
        if remedy:
            changes, current = remedy.changes, remedy.plan
    return _drop_unneeded(config, cluster, plan, changes)


def _drop_unneeded(config: Config, cluster: Cluster, plan: Plan, changes: Changes) -> Remedy | None:
    best: Remedy | None = None
    for name in [None, *changes]:
        fewer = {key: value for key, value in changes.items() if key != name}
        remedy = _try(config, cluster, plan, with_utilization(config, cluster, fewer))
        if remedy and remedy.plan.fits:
            changes, best = fewer, remedy
    return best


def with_utilization(config: Config, cluster: Cluster, changes: Changes) -> Changes:
    """The changes, with gpu_memory_utilization lowered or raised if they need it."""
    try:
        changed = apply(config, cluster, changes)
        return changes | _utilization(*changed, make_plan(*changed))
    except UserError:
        return changes


# Each step returns what it would change, given the configuration and its plan; nothing if it cannot help.


def _sequence_parallel(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    layout = config.parallel
    on = layout.sequence_parallel or layout.tensor_model_parallel_size == 1
    return {} if on else {"parallel.sequence_parallel": True}


def _utilization(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    """The share that fits in the rollout, if that is less than configured; at least what vLLM needs to start."""
    memory, rollout, now = cluster.gpu_memory, plan.rollout, config.rollout.gpu_memory_utilization
    over = max(stage.totals["rollout"] for stage in plan.stages) - memory
    least = ceil(100 * (rollout.weights + rollout.activations + rollout.least_kv_cache) / memory) / 100
    most = floor(100 * (now - over / memory)) / 100
    wanted = max(least, min(now, most))
    return {"rollout.gpu_memory_utilization": wanted} if wanted != now and wanted <= 1 else {}


def _smaller_buckets(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"rollout.refit_bucket_mib": 128} if config.rollout.refit_bucket_mib > 128 else {}


def _smaller_chunks(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"objective.chunk_size": 512} if config.objective.chunk_size > 512 else {}


def _offload_teacher(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    has_weights = config.teacher_kind in ("frozen", "ema")
    return {"teacher.placement": "offload"} if has_weights and config.teacher.placement == "resident" else {}


def _offload_optimizer(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"optim.placement": "offload"} if config.optim.placement == "resident" else {}


def _distributed_optimizer(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {} if config.optim.use_distributed_optimizer else {"optim.use_distributed_optimizer": True}


def _recompute(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"model.recompute": "full"} if config.model.recompute == "none" else {}


def _one_sequence(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"train.micro_batch_size": 1} if config.train.micro_batch_size > 1 else {}


def _rollout_tensor_parallel(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"rollout.tensor_model_parallel_size": 2 * config.rollout.tensor_model_parallel_size}


def _expert_parallel(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"parallel.expert_model_parallel_size": 2 * config.parallel.expert_model_parallel_size}


def _tensor_parallel(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    size = 2 * config.parallel.tensor_model_parallel_size
    if size > cluster.gpus_per_node:  # too slow between machines
        return {}
    sequence_parallel = {} if config.parallel.sequence_parallel else {"parallel.sequence_parallel": True}
    return {"parallel.tensor_model_parallel_size": size, **sequence_parallel}


def _pipeline_parallel(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"parallel.pipeline_model_parallel_size": 2 * config.parallel.pipeline_model_parallel_size}


def _more_nodes(config: Config, cluster: Cluster, plan: Plan) -> Changes:
    return {"nodes": 2 * cluster.nodes}


# In this order: steps that cost nothing, time in every step, traffic between ranks, more machines.
_STEPS: list[Callable[[Config, Cluster, Plan], Changes]] = [
    _sequence_parallel,
    _utilization,
    _smaller_buckets,
    _smaller_chunks,
    _distributed_optimizer,
    _offload_teacher,
    _offload_optimizer,
    _one_sequence,
    _recompute,
    _rollout_tensor_parallel,
    _expert_parallel,
    _tensor_parallel,
    _pipeline_parallel,
    _more_nodes,
]
