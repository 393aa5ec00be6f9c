"""How far the student's next-token distribution is from the teacher's, and the gradient that brings it nearer.

Imports torch only and takes process groups as arguments. docs/numerics.md explains the forms and their precision.
"""

from megatron_opsd.objective.linear import linear_divergence
from megatron_opsd.objective.spec import Divergence
from megatron_opsd.objective.vocab_parallel import vocab_parallel_divergence

__all__ = ["Divergence", "linear_divergence", "vocab_parallel_divergence"]
