"""Settings that cost time and are not needed: the plan without them still fits, with room for what is estimated.

Each is a full plan with the changed settings. Memory is taken for what buys most time first.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_opsd.config import Config, ObjectiveConfig
from megatron_opsd.errors import UserError
from megatron_opsd.plan.planner import Cluster, Plan, find_architecture, make_plan
from megatron_opsd.plan.remedies import Changes, apply

FREE = 0.1  # of a GPU's memory must remain in each phase that grows
ESTIMATED = ("activations", "one layer's backward")  # by formula; other rows are exact or bounds
STRETCH = 1.5  # what is estimated may be so many times as large
STRETCH_EXPERTS = 2.0  # an expert's rank may get twice its share of the tokens
MICROBATCHES = 4  # to a stage: with fewer, more data-parallel ranks would leave a pipeline idle


@dataclass(frozen=True)
class Unneeded:
    """Settings to change, with those of the ones before it in force.

    remains: bytes in the fullest of the phases that grow. phase: which it is.
    """

    changes: Changes
    remains: int
    phase: str


def find_unneeded(config: Config, cluster: Cluster) -> list[Unneeded]:
    """What can be given back, all of it together; nothing if the plan does not fit."""
    given = make_plan(config, cluster)
    if not given.fits:
        return []
    has_experts = find_architecture(config.model.path)[0].moe is not None
    stretch = STRETCH_EXPERTS if has_experts else STRETCH
    found = []
    for step in _STEPS:
        best: Unneeded | None = None
        while changes := step(config):  # sizes are halved as often as possible
            try:
                changed, _ = apply(config, cluster, changes)
                plan = make_plan(changed, cluster)
            except UserError:  # it does not divide
                break
            grown = _fullest_grown(given, plan, stretch)
            if grown is None or not _keeps_pipeline_busy(config, changed, plan):
                break
            best, config, given = Unneeded(changes, *grown), changed, plan
        if best:
            found.append(best)
    return found


def _fullest_grown(given: Plan, plan: Plan, stretch: float) -> tuple[int, str] | None:
    """What remains in the fullest of the phases that need more than before, and its name; none if it is too little."""
    memory = plan.cluster.gpu_memory
    grown = []
    for number, stage in enumerate(plan.stages):
        same = [given.stages[number]] if len(plan.stages) == len(given.stages) else given.stages
        for phase, parts in stage.phases.items():
            total = sum(parts.values())
            more = (stretch - 1) * sum(parts.get(name, 0) for name in ESTIMATED)
            if total > max(old.totals[phase] for old in same):
                grown.append((memory - total, phase, memory - total - more))
    if not plan.fits or not grown or min(left for *_, left in grown) < FREE * memory:
        return None
    remains, phase, _ = min(grown)
    return remains, phase


def _keeps_pipeline_busy(config: Config, changed: Config, plan: Plan) -> bool:
    """Whether less tensor parallelism leaves a pipeline enough micro-batches. Fewer stages are idle less."""
    stages = changed.parallel.pipeline_model_parallel_size
    fewer_stages = stages < config.parallel.pipeline_model_parallel_size
    return stages == 1 or fewer_stages or plan.batch.microbatches >= MICROBATCHES * stages


# Each step returns what it would change; nothing if there is nothing to give back.


def _recompute(config: Config) -> Changes:
    return {"model.recompute": "none"} if config.model.recompute == "full" else {}


def _resident_optimizer(config: Config) -> Changes:
    return {"optim.placement": "resident"} if config.optim.placement == "offload" else {}


def _resident_teacher(config: Config) -> Changes:
    return {"teacher.placement": "resident"} if config.teacher.placement == "offload" else {}


def _fewer_stages(config: Config) -> Changes:
    size = config.parallel.pipeline_model_parallel_size
    return {"parallel.pipeline_model_parallel_size": size // 2} if size % 2 == 0 else {}


def _less_tensor_parallel(config: Config) -> Changes:
    size = config.parallel.tensor_model_parallel_size
    if size % 2:
        return {}
    alone = {"parallel.sequence_parallel": False} if size == 2 else {}
    return {"parallel.tensor_model_parallel_size": size // 2, **alone}


def _larger_chunks(config: Config) -> Changes:
    usual = ObjectiveConfig().chunk_size
    return {"objective.chunk_size": usual} if config.objective.chunk_size < usual else {}


# In this order: what costs most time first.
_STEPS: list[Callable[[Config], Changes]] = [
    _recompute,
    _resident_optimizer,
    _resident_teacher,
    _fewer_stages,
    _less_tensor_parallel,
    _larger_chunks,
]
