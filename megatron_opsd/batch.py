"""From prompts and rollouts to padded micro-batches whose response spans are aligned on both sides.

A sequence is prompt + response without its last token: the response token at place t is predicted at the position
before it, on the student's side and on the teacher's, whatever the two prompts' lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.types import Rollout


@dataclass(frozen=True)
class Sample:
    """One response after both prompts, as token ids."""

    student_prompt: list[int]
    teacher_prompt: list[int]
    rollout: Rollout


@dataclass(frozen=True)
class Batch:
    """The global batch of one step, the same on every rank.

    student_length, teacher_length: the longest padded lengths; where ``one_length``, all micro-batches have them, as
    pipelines need, else each is as long as its own longest sequence.
    skip_first_tokens: response tokens at the start that are not trained on.
    """

    samples: list[Sample]
    student_length: int
    teacher_length: int
    skip_first_tokens: int
    multiple: int
    one_length: bool

    def tokens(self, sample: Sample) -> int:
        """Number of the sample's response tokens that are trained on."""
        return max(0, len(sample.rollout.token_ids) - self.skip_first_tokens)


@dataclass(frozen=True)
class Microbatch:
    """What one rank computes at once: b sequences with n response tokens together, ordered by sequence, then time."""

    student_tokens: Tensor  # [b, s]
    student_index: Tensor  # [n] rows of the flattened [s*b] that predict the response tokens
    teacher_tokens: Tensor  # [b, t]
    teacher_index: Tensor  # [n]
    response_ids: Tensor  # [n]
    rollout_logprobs: Tensor  # [n] what vLLM said of them
    sequence: Tensor  # [n] number of the token's sequence in the global batch
    token_weights: Tensor  # [n]
    count: int  # the divisor's share of this micro-batch: tokens, or sequences


def build_batch(
    samples: Sequence[Sample], skip_first_tokens: int = 0, multiple: int = 1, one_length: bool = False
) -> Batch:
    """Collect a step's samples.

    multiple: padded lengths are rounded up to it (sequence parallelism splits them evenly).
    one_length: all micro-batches get the same length.
    """
    student, teacher = _lengths(samples, multiple)
    return Batch(list(samples), student, teacher, skip_first_tokens, multiple, one_length)


def _lengths(samples: Sequence[Sample], multiple: int) -> tuple[int, int]:
    """Padded lengths of the student's and the teacher's sequences."""
    responses = [len(sample.rollout.token_ids) for sample in samples]
    longest = (
        max(len(prompt) + n - 1 for prompt, n in zip(prompts, responses, strict=True))
        for prompts in ([x.student_prompt for x in samples], [x.teacher_prompt for x in samples])
    )
    student, teacher = (-(-length // multiple) * multiple for length in longest)
    return student, teacher


def split(
    batch: Batch,
    micro_batch_size: int,
    dp_group: dist.ProcessGroup,
    normalization: Literal["token", "sequence"],
    device: torch.device,
) -> list[Microbatch]:
    """This data-parallel rank's micro-batches: its sequences are r, r + size of dp_group, ... of the global batch.

    The weights and counts make (sum over all ranks of weight * loss) / (sum of counts) the mean over the response
    tokens of the global batch ("token"), or the mean of its sequences' means ("sequence").
    """
    own = list(enumerate(batch.samples))[dp_group.rank() :: dp_group.size()]
    assert len(own) % micro_batch_size == 0, (len(own), micro_batch_size)
    return [
        _microbatch(batch, own[i : i + micro_batch_size], normalization, device)
        for i in range(0, len(own), micro_batch_size)
    ]


def _microbatch(
    batch: Batch, own: list[tuple[int, Sample]], normalization: Literal["token", "sequence"], device: torch.device
) -> Microbatch:
    skip = batch.skip_first_tokens
    student_length, teacher_length = batch.student_length, batch.teacher_length
    if not batch.one_length:
        student_length, teacher_length = _lengths([sample for _, sample in own], batch.multiple)
    prompts = {
        "student": ([sample.student_prompt for _, sample in own], student_length),
        "teacher": ([sample.teacher_prompt for _, sample in own], teacher_length),
    }
    responses = [sample.rollout.token_ids for _, sample in own]
    sides: dict[str, tuple[Tensor, Tensor]] = {}
    for side, (side_prompts, length) in prompts.items():
        tokens = torch.zeros(len(own), length, dtype=torch.long)
        rows: list[Tensor] = []
        for j, (prompt, response) in enumerate(zip(side_prompts, responses, strict=True)):
            sequence = torch.tensor((prompt + response)[:-1])
            tokens[j, : len(sequence)] = sequence
            first = len(prompt) - 1
            rows.append(torch.arange(first + skip, first + max(skip, len(response))) * len(own) + j)
        sides[side] = tokens.to(device), torch.cat(rows).to(device)
    lengths = [batch.tokens(sample) for _, sample in own]
    weights = [1.0 / n if normalization == "sequence" and n else 1.0 for n in lengths]
    repeats = torch.tensor(lengths)
    return Microbatch(
        student_tokens=sides["student"][0],
        student_index=sides["student"][1],
        teacher_tokens=sides["teacher"][0],
        teacher_index=sides["teacher"][1],
        response_ids=_flatten([response[skip:] for response in responses], torch.long, device),
        rollout_logprobs=_flatten([sample.rollout.logprobs[skip:] for _, sample in own], torch.float32, device),
        sequence=torch.tensor([i for i, _ in own]).repeat_interleave(repeats).to(device),
        token_weights=torch.tensor(weights).repeat_interleave(repeats).to(device),
        count=sum(lengths) if normalization == "token" else sum(n > 0 for n in lengths),
    )


def _flatten(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype, device=device)
