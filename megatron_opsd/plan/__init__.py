"""What a run needs on a cluster, told before one is rented: no GPU, no weights, no vLLM. docs/plan.md explains it."""

import json

from megatron_opsd.config import Config
from megatron_opsd.plan.planner import Cluster, make_plan
from megatron_opsd.plan.remedies import find_remedies
from megatron_opsd.plan.report import as_json, print_plan


def run_plan(title: str, config: Config, cluster: Cluster, as_machine: bool) -> bool:
    """Print the plan, as tables or (``as_machine``) as JSON. Returns whether it fits."""
    plan = make_plan(config, cluster)
    remedies = find_remedies(config, cluster)
    if as_machine:
        print(json.dumps(as_json(plan, remedies), indent=2))
    else:
        print_plan(title, config, plan, remedies)
    return plan.fits
