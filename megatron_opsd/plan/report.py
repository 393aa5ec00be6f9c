"""`opsd plan`: a plan as a table for people and as JSON for machines. docs/plan.md explains it."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_opsd.config import Config
from megatron_opsd.errors import UserError
from megatron_opsd.plan.formulas import GIB
from megatron_opsd.plan.layouts import find_layout
from megatron_opsd.plan.planner import Cluster, Plan, find_architecture, make_plan
from megatron_opsd.plan.remedies import Remedy, find_remedies, options
from megatron_opsd.plan.unneeded import Unneeded, find_unneeded
from megatron_opsd.types import Phase

WIDTH = 100  # columns if the output is not a terminal


def run_plan(title: str, config: Config, cluster: Cluster, as_machine: bool) -> bool:
    """Print the plan, as tables or (``as_machine``) as JSON. Returns whether it fits."""
    arch, _ = find_architecture(config.model.path)
    try:
        plan = make_plan(config, cluster)
    except UserError as error:
        found = find_layout(config, arch, cluster)
        if found is None:
            raise
        changes, fits = found
        what = "a layout that fits" if fits else "a layout that divides, but does not fit"
        raise UserError(f"{error}; {what}: {options(changes)}") from error
    remedies, unneeded = find_remedies(config, cluster), find_unneeded(config, cluster)
    if as_machine:
        print(json.dumps(as_json(plan, remedies, unneeded), indent=2))
    else:
        print_plan(title, config, plan, remedies, unneeded)
    return plan.fits


def as_json(plan: Plan, remedies: list[Remedy], unneeded: list[Unneeded]) -> dict[str, Any]:
    """Everything in the tables, and the parts of every stage; memory in bytes."""
    stages = [
        {**asdict(stage), "totals": stage.totals, "peak_phase": stage.peak_phase, "peak": stage.peak}
        for stage in plan.stages
    ]
    return {
        **asdict(plan),
        "stages": stages,
        "fits": plan.fits,
        "shortfall": plan.shortfall,
        "fullest_stage": plan.fullest,
        "disk": plan.disk,
        "remedies": [
            {
                "changes": remedy.changes,
                "fits": remedy.plan.fits,
                "saves": remedy.saves,
                "shortfall": remedy.plan.shortfall,
                "peak": remedy.plan.stages[remedy.plan.fullest].peak,
            }
            for remedy in remedies
        ],
        "unneeded": [asdict(setting) for setting in unneeded],
    }


def print_plan(title: str, config: Config, plan: Plan, remedies: list[Remedy], unneeded: list[Unneeded]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=WIDTH, highlight=False)
    cluster = plan.cluster
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    console.print(f"[bold]{title}[/] on {nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory_gib:g} GiB\n")
    for name, text in _facts(config, plan):
        console.print(f"{name:<8} {text}", soft_wrap=True, markup=False)
    console.print("\n[bold]Each pipeline stage[/]: GiB on one rank in each phase of a step")
    console.print(_stage_table(plan))
    console.print(f"\n[bold]Stage {plan.fullest}[/], the fullest: GiB on one rank")
    console.print(_phase_table(plan))
    console.print()
    console.print(verdict(plan), style="green" if plan.fits else "red")
    for line in _remedy_lines(remedies) + _unneeded_lines(unneeded):
        console.print(line, soft_wrap=True)


def verdict(plan: Plan) -> str:
    """One line: whether it fits, where it is tightest, and by how much."""
    stage, rollout = plan.stages[plan.fullest], plan.rollout
    free = plan.cluster.gpu_memory - stage.peak
    where = f"in the {stage.peak_phase} phase on stage {plan.fullest}"
    if plan.fits:
        return f"It fits: {_gib(free)} GiB remain at the peak, {where}."
    if -free == plan.shortfall:
        return f"It does not fit: {_gib(-free)} GiB are missing {where}."
    return (
        f"It does not fit: rollout.gpu_memory_utilization leaves vLLM a KV cache {_gib(plan.shortfall)} GiB too small "
        f"for one sequence of {rollout.longest_sequence:,} tokens."
    )


def _facts(config: Config, plan: Plan) -> list[tuple[str, str]]:
    layout, batch, rollout = config.parallel, plan.batch, plan.rollout
    experts = f" (experts {layout.expert_model_parallel_size} x {batch.expert_data_parallel_size})"
    known = "; by its name, for lack of a config.json" if plan.is_published else ""
    teacher = " ".join(filter(None, (config.teacher_kind, config.teacher.placement))) if config.teacher_kind else "none"
    teacher_length = f"{batch.teacher_length:,}" if batch.teacher_length else "none"
    return [
        ("model", f"{plan.model}, {plan.total_parameters / 1e9:.2f} B parameters, {config.model.dtype}{known}"),
        (
            "layout",
            f"tensor {layout.tensor_model_parallel_size} x pipeline {layout.pipeline_model_parallel_size} x "
            f"data {batch.data_parallel_size}{experts if layout.expert_model_parallel_size > 1 else ''}"
            f"{', sequence parallel' if layout.sequence_parallel else ''}",
        ),
        (
            "memory",
            f"recompute {config.model.recompute}, teacher {teacher}, optimizer {config.optim.placement}",
        ),
        (
            "step",
            f"{batch.global_batch_size} sequences: {batch.microbatches} micro-batches of {batch.micro_batch_size} on "
            f"each of {batch.data_parallel_size} data-parallel ranks",
        ),
        ("lengths", f"up to {batch.student_length:,} tokens (student), {teacher_length} (teacher)"),
        *(
            []
            if not config.needs_engine
            else [
                (
                    "vLLM",
                    f"tensor {rollout.tensor_model_parallel_size} x {rollout.engines}, each with "
                    f"{-(-batch.global_batch_size // rollout.engines)} sequences a step and a KV cache for "
                    f"{rollout.kv_tokens // rollout.longest_sequence:,} of {rollout.longest_sequence:,} tokens",
                )
            ]
        ),
        *_save_facts(config, plan),
    ]


def _save_facts(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """What checkpoints ask for."""
    save, nodes, lead = plan.save_memory, plan.cluster.nodes, config.checkpoint.signal_lead_seconds
    model = f" and {_gib(plan.hf_export)} GiB the trained model" if plan.hf_export else ""
    count = plan.most_checkpoints
    checkpoints = "1 checkpoint" if count == 1 else f"{count} checkpoints, with the one being written,"
    pinned = ("host", f"{_gib(plan.pinned_host_memory)} GiB of each node's memory pinned, for what is offloaded")
    if not count:
        return [("on disk", f"no checkpoints{model}"), pinned]
    where = f"{save.nodes} of {nodes} nodes" if nodes > 1 else "the node"
    elsewhere = f" ({_gib(save.elsewhere)} on the others)" if save.elsewhere else ""
    return [
        ("on disk", f"{_gib(plan.checkpoint)} GiB a checkpoint (weights, optimizer)"),
        ("", f"up to {_gib(plan.disk)} GiB in all: {checkpoints}{model}"),
        ("", f"a save within the signal's lead of {lead:g} s asks for {plan.write_speed / GIB:,.2g} GiB/s"),
        pinned,
        (
            "",
            f"a save needs {_gib(save.peak)} GiB on {where} for a moment{elsewhere}, "
            f"{_gib(save.writing)} until it is written",
        ),
    ]


def _stage_table(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in ("stage", "layers", "parameters", *Phase, "remain"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, stage in enumerate(plan.stages):
        cells = [
            f"[bold]{_gib(total)}[/]" if phase == stage.peak_phase else _gib(total)
            for phase, total in stage.totals.items()
        ]
        remain = _gib(plan.cluster.gpu_memory - stage.peak)
        table.add_row(str(number), str(stage.layers), f"{stage.parameters / 1e9:.3f} B", *cells, remain)
    return table


def _phase_table(plan: Plan) -> Table:
    stage = plan.stages[plan.fullest]
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for phase in Phase:
        table.add_column(phase, justify="right", no_wrap=True)
    names = list(dict.fromkeys(name for parts in stage.phases.values() for name in parts))
    last = "CUDA and NCCL (assumed)"
    for name in [*(name for name in names if name != last), last]:
        table.add_row(name, *(_gib(n) if (n := stage.phases[phase].get(name)) else "-" for phase in Phase))
    table.add_row("total", *(_gib(stage.totals[phase]) for phase in Phase), style="bold")
    table.add_row("remain", *(_gib(plan.cluster.gpu_memory - stage.totals[phase]) for phase in Phase))
    return table


def _remedy_lines(remedies: list[Remedy]) -> list[str]:
    fitting = [remedy for remedy in remedies if remedy.plan.fits]
    others = sorted((remedy for remedy in remedies if not remedy.plan.fits), key=lambda remedy: -remedy.saves)
    lines = ["", "What makes it fit, cheapest first:"] if fitting else []
    lines += [
        f"  {options(remedy.changes)}: -{_gib(remedy.saves)} GiB, then {_gib(-remedy.plan.shortfall)} GiB remain"
        for remedy in fitting[:5]
    ]
    if others and len(fitting) < 2:
        lines += ["", "What helps, and is not enough by itself:"]
        lines += [f"  {options(remedy.changes)}: -{_gib(remedy.saves)} GiB" for remedy in others[:5]]
    return lines


def _unneeded_lines(unneeded: list[Unneeded]) -> list[str]:
    lines = [
        f"  {options(setting.changes)}: {_gib(setting.remains)} GiB remain in the {setting.phase} phase"
        for setting in unneeded
    ]
    return ["", "What costs time and is not needed, each with those above it:", *lines] if lines else []


def _gib(number: int) -> str:
    return f"{number / GIB:,.1f}"
