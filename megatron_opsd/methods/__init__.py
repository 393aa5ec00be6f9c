"""What is learned from: one small file a method."""

from megatron_opsd.config import Config, DistillConfig, GrpoConfig, OpsdConfig, SftConfig, StarConfig
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods.answers import Writer
from megatron_opsd.methods.distill import Distill
from megatron_opsd.methods.grpo import GRPO
from megatron_opsd.methods.method import Method
from megatron_opsd.methods.opsd import OPSD
from megatron_opsd.methods.sft import SFT
from megatron_opsd.methods.star import STaR
from megatron_opsd.rollout.engine import Engine


def build_method(config: Config, prompts: PromptBuilder, sampler: Sampler, engine: Engine) -> Method:
    """The method that ``method.kind`` names."""
    writer = Writer(config, prompts, engine)
    match config.method:
        case OpsdConfig() as method:
            return OPSD(config, method, sampler, writer)
        case GrpoConfig() as method:
            return GRPO(config, method, sampler, writer)
        case StarConfig() as method:
            return STaR(config, method, sampler, writer)
        case SftConfig():
            return SFT(config, sampler, prompts)
        case DistillConfig() as method:
            return Distill(config, method, sampler, writer)
