"""Losses per token over a vocabulary that is spread over ranks: distances between student and teacher, log-likelihoods.

Imports torch only and takes process groups as arguments. docs/numerics.md explains the forms and their precision.
"""

from megatron_opsd.objective.divergence import Divergence
from megatron_opsd.objective.high_entropy import HighEntropy
from megatron_opsd.objective.linear import linear_divergence, linear_loss
from megatron_opsd.objective.sampled_token import SampledToken
from megatron_opsd.objective.types import TokenLoss, Tokens
from megatron_opsd.objective.vocab_parallel import vocab_parallel_divergence

__all__ = [
    "Divergence",
    "HighEntropy",
    "SampledToken",
    "TokenLoss",
    "Tokens",
    "linear_divergence",
    "linear_loss",
    "vocab_parallel_divergence",
]
