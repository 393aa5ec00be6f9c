"""Patches and private names of Megatron-Core 0.16. tests/unit/test_compat.py fails when they need another look."""

from collections.abc import Iterator
from itertools import chain
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE as HAVE_APEX_OR_TE
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe import moe_utils
from torch import Tensor


class GPTWithoutLogits(GPTModel):
    """GPTModel whose last stage returns hidden states after the final norm, so that whole logits never exist.

    Megatron has no option for this. It overrides the private method that computes logits and their loss.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states  # [s, b, h], or [s/tp, b, h] under sequence parallelism


def define_te_general_gemm() -> None:
    """Define a name that Megatron's router reads but leaves undefined without Transformer Engine."""
    moe_utils.te_general_gemm = None


def main_params(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Each bfloat16 weight, this rank's float32 parameter for it, and the elements of the weight that it covers."""
    for part in _parts(optimizer):
        distributed = isinstance(part, DistributedOptimizer)
        weights = part.model_float16_groups if distributed else part.float16_groups
        main = part.shard_fp32_from_float16_groups if distributed else part.fp32_from_float16_groups
        for weight, main_param in zip(chain(*weights), chain(*main), strict=True):
            own = slice(None)
            if distributed:
                place = part._get_model_param_range_map(weight)["param"]
                own = slice(place.start, place.end)
            yield weight, main_param, own


def clip_gradients(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Scale the gradients down to ``clip_grad``. ``optimizer.step`` would compute their norm a second time for this."""
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)


def moments(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Adam's moments; empty before its first step."""
    found = []
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                # Use get, because any entry, even an empty one, keeps Megatron from making the states when it loads.
                states = part.optimizer.state.get(parameter, {}).values()
                found += [state for state in states if torch.is_tensor(state) and state.dim()]
    return found


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def report_through(manager: SyncManager) -> None:
    """Let the writers of checkpoints report through this manager's process.

    SLURM sends the signals that ask for a save to all processes of a job. They would end Megatron's own manager in the
    middle of that save. It would also outlive a rank that is killed.
    """
    filesystem_async._results_queue = manager.Queue()


def repair_checkpoints_of_torch_adam() -> None:
    """Make the distributed optimizer's checkpoints work with torch's Adam (three repairs, see the comments).

    Megatron is written for the fused Adam of Transformer Engine or Apex and uses torch's if neither is installed.
    """
    describe_state, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def describe(self: Any) -> dict:
        for group in self.optimizer.param_groups:  # torch's Adam has no state to load into before its first step
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return describe_state(self)

    def load(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for param_state in self.optimizer.state.values():  # Megatron restores one tensor for all parameters, and
            param_state["step"] = param_state["step"].clone()  # torch's Adam would increment it once for each

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":  # only torch's Adam keeps it in the state; Megatron has it in the group
                target.copy_(tensors[key])

    DistributedOptimizer.state_dict = describe
    DistributedOptimizer.load_state_dict = load
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
