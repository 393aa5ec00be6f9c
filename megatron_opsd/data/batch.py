"""From prompts and rollouts to micro-batches, padded or packed, whose response spans are aligned on both sides.

A sequence is prompt + response without its last token: the response token at place t is predicted at the position
before it, on the student's side and on the teacher's, whatever the two prompts' lengths.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from megatron_opsd.data.weighting import Weighting
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

    weighting: of the responses' tokens.
    multiple: rows are padded to a multiple of it (sequence parallelism splits them evenly).
    one_length: all micro-batches' rows have one length, as pipelines need, else each is as long as it must be.
    packing: sequences follow one another in a micro-batch's only row, instead of a padded row for each.
    """

    samples: list[Sample]
    weighting: Weighting = field(default_factory=Weighting)
    multiple: int = 1
    one_length: bool = False
    packing: bool = False

    @property
    def sides(self) -> tuple[Side, ...]:
        """Those that read the batch."""
        return SIDES if self.samples[0].teacher_prompt is not None else ("student",)

    @property
    def is_empty(self) -> bool:
        """Whether no token is trained on."""
        return not any(self.weighting.trained(sample.rollout) for sample in self.samples if not sample.is_fill)

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
    rollout_logprobs: Tensor  # [n] what vLLM said of them
    is_sampled: Tensor  # [n] bool: whether it did
    is_end: Tensor  # [n] bool: ends its turn
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


def split(batch: Batch, assignment: Assignment, dp_rank: int, device: torch.device) -> list[Microbatch]:
    """The micro-batches of a data-parallel rank."""
    rows = {side: batch.row_lengths(side, assignment)[dp_rank] for side in batch.sides}
    return [
        _microbatch(batch, numbers, {side: rows[side][i] for side in batch.sides}, device)
        for i, numbers in enumerate(assignment[dp_rank])
    ]


def _microbatch(batch: Batch, numbers: list[int], rows: dict[Side, int], device: torch.device) -> Microbatch:
    samples, weighting = [batch.samples[i] for i in numbers], batch.weighting
    real = [sample for sample in samples if not sample.is_fill]
    lengths = [0 if sample.is_fill else weighting.measured(sample.rollout) for sample in samples]
    repeats = torch.tensor(lengths)
    sides = {
        side: _sequences(batch, [sample.sequence(side) for sample in samples], lengths, row, device)
        for side, row in rows.items()
    }

    def tokens(values: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
        """A value for each measured token, from one for each token of the responses or for the measured ones."""
        measured = zip(values, (weighting.measured(sample.rollout) for sample in real), strict=True)
        return torch.tensor([v for part, n in measured for v in part[len(part) - n :]], dtype=dtype, device=device)

    def sequences(values: list[float] | list[int]) -> Tensor:
        """A value for each measured token, from one for each sequence."""
        return torch.tensor(values).repeat_interleave(repeats).to(device)

    unknown = [[0.0] * len(sample.rollout.token_ids) for sample in real]
    return Microbatch(
        student=sides["student"],
        teacher=sides.get("teacher"),
        response_ids=tokens((sample.rollout.token_ids for sample in real), torch.long),
        rollout_logprobs=tokens(
            (x.rollout.logprobs or none for x, none in zip(real, unknown, strict=True)), torch.float32
        ),
        is_sampled=sequences([int(bool(sample.rollout.logprobs)) for sample in samples]).bool(),
        is_end=tokens((_ends(sample.rollout) for sample in real), torch.bool),
        advantages=sequences([sample.advantage for sample in samples]),
        sequence=sequences(numbers),
        token_weights=tokens((weighting.weights(sample.rollout) for sample in real), torch.float32),
        count=sum(weighting.count(sample.rollout) for sample in real),
    )


def _ends(rollout: Rollout) -> list[bool]:
    """Whether each token ends the turn."""
    return [False] * (len(rollout.token_ids) - 1) + [rollout.finish_reason == "stop"]


def _sequences(
    batch: Batch, sequences: list[list[int]], measured: list[int], row: int, device: torch.device
) -> Sequences:
    """Rows of ``row`` tokens; the last ``measured`` positions of each sequence predict its response tokens."""
    if batch.packing:
        ends = list(accumulate(map(len, sequences)))
        joined = [token for sequence in sequences for token in sequence]
        tokens = torch.tensor([joined + [0] * (row - len(joined))], dtype=torch.long)
        index = [torch.arange(end - n, end) for end, n in zip(ends, measured, strict=True)]
        # The row's padding in pieces no longer than a sequence: attention's time grows with their squares.
        longest = max(1, *map(len, sequences))
        padding = [*range(ends[-1] + longest, row, longest), row] if row > ends[-1] else []
        boundaries = torch.tensor([0, *ends, *padding], dtype=torch.int32).to(device)
    else:
        b = len(sequences)
        tokens = torch.tensor([sequence + [0] * (row - len(sequence)) for sequence in sequences], dtype=torch.long)
        index = [
            torch.arange(len(sequence) - n, len(sequence)) * b + j
            for j, (sequence, n) in enumerate(zip(sequences, measured, strict=True))
        ]
        boundaries = None
    return Sequences(tokens.to(device), torch.cat(index).to(device), boundaries)
