"""The token losses that [objective] describes."""

from megatron_opsd.config import Config
from megatron_opsd.objective import Divergence, SampledToken
from megatron_opsd.objective.sampled_token import Advantage


def divergence(config: Config) -> Divergence:
    """Between the teacher's and the student's next-token distributions."""
    settings = config.objective
    if settings.clip_mode == "none":
        return Divergence(settings.kind, settings.beta, settings.temperature)
    return Divergence(settings.kind, settings.beta, settings.temperature, settings.clip, settings.clip_mode)


def policy_gradient(config: Config, advantage: Advantage) -> SampledToken:
    """Of the sampled tokens, with the advantages that they are given or that the teacher says."""
    return SampledToken(config.objective.temperature, advantage, config.objective.importance_cap)


def log_likelihood() -> SampledToken:
    """Of the tokens: advantage 1."""
    return SampledToken()
