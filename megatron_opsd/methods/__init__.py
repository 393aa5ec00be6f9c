"""What is learned from: one small file a method."""

from collections.abc import Callable
from typing import Protocol

from megatron_opsd.config import Config, SftConfig
from megatron_opsd.data.batch import Sample
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.objective import TokenLoss
from megatron_opsd.rollout.engine import Engine
from megatron_opsd.types import Group


class Method(Protocol):
    """Where responses come from, which of them are learned from, and with which loss."""

    loss: TokenLoss

    def collect(self, step: int, should_abort: Callable[[], bool]) -> list[Group]:
        """A step's problems, their responses and grades, the same on every rank; collective.

        step: how many are done, which is also the version of the weights that write.
        """
        ...

    def samples(self, groups: list[Group]) -> list[Sample]:
        """What is learned from them; may be empty."""
        ...


def build_method(config: Config, prompts: PromptBuilder, sampler: Sampler, engine: Engine) -> Method:
    """The method that ``method.kind`` names."""
    if isinstance(config.method, SftConfig):
        from megatron_opsd.methods.sft import SFT

        return SFT(config, prompts, sampler)
    from megatron_opsd.methods.opsd import OPSD

    return OPSD(config, config.method, prompts, sampler, engine)
