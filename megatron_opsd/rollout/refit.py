"""Refit: sends the student's weights to the engine, every tensor exactly once and unchanged, or stops the run."""

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from megatron_opsd.config import Config
from megatron_opsd.model.student import LossSums
from megatron_opsd.rollout.engine import Engine, RefitError
from megatron_opsd.weights.export import Exporter, checksum
from megatron_opsd.weights.mapping import Shape

# Largest mean absolute difference, in nats, between vLLM's and Megatron's log-probs that rounding can explain.
MAX_LOGPROB_GAP = {"float32": 1e-4, "bfloat16": 0.05}


def refit(exporter: Exporter, engine: Engine, version: int, verify: bool) -> None:
    """Stream the student's weights into ``engine`` as weight ``version``.

    verify: also compare the checksum of every tensor that arrives with its checksum before the transfer.

    Raises:
        RefitError: a tensor is missing or unknown, arrives twice, or has the wrong shape or contents.
    """
    checksums = exporter.checksums() if verify else {}
    engine.update_weights(verified(exporter, exporter.table.hf_tensors(), checksums), version)


def verified(
    named_tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, Shape], checksums: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Check each tensor and pass it on; at the end check that none is missing."""
    missing = dict(expected)
    for name, tensor in named_tensors:
        if name not in missing:
            why = "arrived twice" if name in expected else "is not part of the model"
            raise RefitError(f"refit: the tensor {name} {why}")
        if tuple(tensor.shape) != missing.pop(name):
            raise RefitError(f"refit: {name} arrived as {list(tensor.shape)} instead of {list(expected[name])}")
        if name in checksums and int(checksum(tensor)) != checksums[name]:
            raise RefitError(f"refit: {name} arrived with other contents than the student holds (checksums differ)")
        yield name, tensor
    if missing:
        raise RefitError(
            f"refit: {len(missing)} of {len(expected)} tensors did not arrive, first {next(iter(missing))}"
        )


def check_logprob_gap(losses: LossSums, version: int, config: Config) -> None:
    """Compare vLLM's log-probs of its own tokens with Megatron's for the same tokens and weights (temperature 1).

    Raises:
        RefitError: the mean absolute difference over the step's response tokens is too large for the dtype.
    """
    means = losses.means()
    if "refit_logprob_gap" not in means or math.isnan(means["logprob_student"]):
        return  # nothing was sampled from the student's prompt, or the step is skipped
    gap = means["refit_logprob_gap"]
    largest = config.rollout.refit_max_logprob_gap or MAX_LOGPROB_GAP[config.model.dtype]
    if not gap <= largest:
        raise RefitError(
            f"refit: vLLM's log-probs differ from the student's by {gap:.2g} on average (limit {largest:.2g}, worst "
            f"token {losses.worst_gap:.2g} in sequence {losses.worst_sequence}): vLLM does not hold weights {version}"
        )
