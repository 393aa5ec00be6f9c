"""From prompts and rollouts to micro-batches, padded or packed, whose response spans are aligned on both sides.

A sequence is prompt + response without its last token: the response token at place t is predicted at the position
before it, on the student's side and on the teacher's, whatever the two prompts' lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from megatron_opsd.types import Rollout

Side = Literal["student", "teacher"]
SIDES: tuple[Side, Side] = ("student", "teacher")
Assignment = list[list[list[int]]]  # [dp][micro-batches] numbers of sequences in the global batch


@dataclass(frozen=True)
class Sample:
    """One response after its prompts, as token ids.

    teacher_prompt: None where the loss needs no teacher.
    advantage: of all of its tokens, for losses that are given one.
    is_fill: makes the batch a multiple of what the layout needs; nothing is learned from it.
    """

    student_prompt: list[int]
    teacher_prompt: list[int] | None
    rollout: Rollout
    advantage: float = 1.0
    is_fill: bool = False

    def sequence(self, side: Side) -> list[int]:
        """What the student or the teacher reads."""
        prompt = self.student_prompt if side == "student" else self.teacher_prompt
        assert prompt is not None
        return (prompt + self.rollout.token_ids)[:-1]


def fill_up(samples: list[Sample], multiple: int) -> list[Sample]:
    """The samples, and as many copies of the shortest as make their number a multiple."""
    missing = -len(samples) % multiple
    if not missing:
        return samples
    shortest = min(samples, key=lambda sample: len(sample.sequence("student")))
    return samples + [replace(shortest, is_fill=True)] * missing


@dataclass(frozen=True)
class Batch:
    """The global batch of one step, the same on every rank.

    skip_first_tokens: response tokens at the start that are not trained on.
    multiple: rows are padded to a multiple of it (sequence parallelism splits them evenly).
    one_length: all micro-batches' rows have one length, as pipelines need, else each is as long as it must be.
    packing: sequences follow one another in a micro-batch's only row, instead of a padded row for each.
    """

    samples: list[Sample]
    skip_first_tokens: int = 0
    multiple: int = 1
    one_length: bool = False
    packing: bool = False

    @property
    def sides(self) -> tuple[Side, ...]:
        """Those that read the batch."""
        return SIDES if self.samples[0].teacher_prompt is not None else ("student",)

    def tokens(self, sample: Sample) -> int:
        """Number of the sample's response tokens that are trained on."""
        return 0 if sample.is_fill else max(0, len(sample.rollout.token_ids) - self.skip_first_tokens)

    def assign(self, micro_batch_size: int, dp_size: int) -> Assignment:
        """The sequences of each micro-batch of each data-parallel rank, as many micro-batches on every rank.

        Rank r has the sequences r, r + dp_size, ... In a packed micro-batch are no more tokens than in a padded one of
        the global batch's longest sequences.
        """
        own = [list(range(rank, len(self.samples), dp_size)) for rank in range(dp_size)]
        if not self.packing:
            assert len(own[0]) % micro_batch_size == 0, (len(own[0]), micro_batch_size)
            return [
                [numbers[i : i + micro_batch_size] for i in range(0, len(numbers), micro_batch_size)] for numbers in own
            ]
        lengths = [max(len(sample.sequence(side)) for side in self.sides) for sample in self.samples]
        bins = [_pack(numbers, lengths, micro_batch_size * max(lengths)) for numbers in own]
        most = max(map(len, bins))
        for rank in bins:
            while len(rank) < most:  # expert parallelism meets the other ranks in every micro-batch
                fullest = max(rank, key=len)
                rank.append([fullest.pop()])
        return bins

    def row_lengths(self, side: Side, assignment: Assignment) -> list[list[int]]:
        """Length of each micro-batch's rows, padding included."""
        together = sum if self.packing else max

        def padded(numbers: list[int]) -> int:
            return -(-together(len(self.samples[i].sequence(side)) for i in numbers) // self.multiple) * self.multiple

        rows = [[padded(numbers) for numbers in rank] for rank in assignment]
        return [[max(map(max, rows))] * len(rank) for rank in rows] if self.one_length else rows


@dataclass(frozen=True)
class Sequences:
    """One side's sequences of a micro-batch, as its model reads them."""

    tokens: Tensor  # [b, s]; packed: [1, s]
    index: Tensor  # [n] rows of the flattened [s*b] that predict the response tokens
    boundaries: Tensor | None  # packed: [sequences + 1 or more], where each begins in the row; then its padding


@dataclass(frozen=True)
class Microbatch:
    """What one rank computes at once: sequences with n response tokens together, ordered by sequence, then time."""

    student: Sequences
    teacher: Sequences | None
    response_ids: Tensor  # [n]
    rollout_logprobs: Tensor | None  # [n] what vLLM said of them, where it wrote them
    advantages: Tensor  # [n]
    sequence: Tensor  # [n] number of the token's sequence in the global batch
    token_weights: Tensor  # [n]
    count: int  # the divisor's share of this micro-batch: tokens, or sequences


def _pack(numbers: list[int], lengths: list[int], room: int) -> list[list[int]]:
    """Sequences into rows of ``room`` tokens, first fit decreasing; needs nemo-toolkit."""
    from nemo.utils.sequence_packing_utils import first_fit_decreasing

    waiting: dict[int, list[int]] = {}
    for number in reversed(numbers):
        waiting.setdefault(lengths[number], []).append(number)
    rows: list[list[int]] = first_fit_decreasing([lengths[number] for number in numbers], room)  # of lengths
    return [[waiting[length].pop() for length in row] for row in rows]


def padding_share(batch: Batch, assignment: Assignment) -> float:
    """Share of both sides' positions that hold no token, over all ranks."""
    places = tokens = 0
    for side in batch.sides:
        for rank, lengths in zip(assignment, batch.row_lengths(side, assignment), strict=True):
            for numbers, length in zip(rank, lengths, strict=True):
                places += length * (1 if batch.packing else len(numbers))
                tokens += sum(len(batch.samples[i].sequence(side)) for i in numbers)
    return 1 - tokens / places


def split(
    batch: Batch,
    assignment: Assignment,
    dp_rank: int,
    normalization: Literal["token", "sequence"],
    device: torch.device,
) -> list[Microbatch]:
    """The micro-batches of a data-parallel rank.

    The weights and counts make (sum over all ranks of weight * loss) / (sum of counts) the mean over the response
    tokens of the global batch ("token"), or the mean of its sequences' means ("sequence").
    """
    rows = {side: batch.row_lengths(side, assignment)[dp_rank] for side in batch.sides}
    return [
        _microbatch(batch, numbers, {side: rows[side][i] for side in batch.sides}, normalization, device)
        for i, numbers in enumerate(assignment[dp_rank])
    ]


def _microbatch(
    batch: Batch,
    numbers: list[int],
    rows: dict[Side, int],
    normalization: Literal["token", "sequence"],
    device: torch.device,
) -> Microbatch:
    samples, skip = [batch.samples[i] for i in numbers], batch.skip_first_tokens
    lengths = [batch.tokens(sample) for sample in samples]
    weights = [1.0 / n if normalization == "sequence" and n else 1.0 for n in lengths]
    repeats = torch.tensor(lengths)
    sides = {
        side: _sequences(batch, [sample.sequence(side) for sample in samples], lengths, row, device)
        for side, row in rows.items()
    }

    def of_responses(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        parts = [part[skip : skip + n] for part, n in zip(values, lengths, strict=True)]
        return torch.tensor([value for part in parts for value in part], dtype=dtype, device=device)

    sampled = all(len(sample.rollout.logprobs) == len(sample.rollout.token_ids) for sample in samples)
    return Microbatch(
        student=sides["student"],
        teacher=sides.get("teacher"),
        response_ids=of_responses([sample.rollout.token_ids for sample in samples], torch.long),
        rollout_logprobs=(
            of_responses([sample.rollout.logprobs for sample in samples], torch.float32) if sampled else None
        ),
        advantages=torch.tensor([sample.advantage for sample in samples]).repeat_interleave(repeats).to(device),
        sequence=torch.tensor(numbers).repeat_interleave(repeats).to(device),
        token_weights=torch.tensor(weights).repeat_interleave(repeats).to(device),
        count=sum(lengths) if normalization == "token" else sum(n > 0 for n in lengths),
    )


def _sequences(
    batch: Batch, sequences: list[list[int]], trained: list[int], row: int, device: torch.device
) -> Sequences:
    """Rows of ``row`` tokens; the last ``trained`` positions of each sequence predict its response tokens."""
    if batch.packing:
        ends = list(accumulate(map(len, sequences)))
        joined = [token for sequence in sequences for token in sequence]
        tokens = torch.tensor([joined + [0] * (row - len(joined))], dtype=torch.long)
        index = [torch.arange(end - n, end) for end, n in zip(ends, trained, strict=True)]
        # The row's padding in pieces no longer than a sequence: attention's time grows with their squares.
        longest = max(1, *map(len, sequences))
        padding = [*range(ends[-1] + longest, row, longest), row] if row > ends[-1] else []
        boundaries = torch.tensor([0, *ends, *padding], dtype=torch.int32).to(device)
    else:
        b = len(sequences)
        tokens = torch.tensor([sequence + [0] * (row - len(sequence)) for sequence in sequences], dtype=torch.long)
        index = [
            torch.arange(len(sequence) - n, len(sequence)) * b + j
            for j, (sequence, n) in enumerate(zip(sequences, trained, strict=True))
        ]
        boundaries = None
    return Sequences(tokens.to(device), torch.cat(index).to(device), boundaries)
