"""Alignment, padding and counting of micro-batches, on sequences a person can check."""

from typing import Any

import pytest
import torch

from megatron_opsd.data.batch import SIDES, Batch, Microbatch, Sample, fill_up, padding_share, split
from megatron_opsd.data.weighting import Weighting
from megatron_opsd.types import Rollout


class Group:
    """Rank and size of a data-parallel group, all that ``split`` asks of one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def sample(student: list[int], teacher: list[int], response: list[int]) -> Sample:
    return Sample(student, teacher, Rollout(response, [-0.1 * token for token in response], "stop", 0))


SAMPLES = [
    sample([11, 12], [21, 22, 23, 24], [1, 2, 3]),
    sample([13], [25], [4]),
    sample([14, 15, 16], [26, 27], [5, 6]),
    sample([17], [28, 29], []),
]


def microbatches(batch: Batch, size: int, group: Group | None = None) -> list[Microbatch]:
    group = group or Group()
    assignment = batch.assign(size, group.size())
    return split(batch, assignment, group.rank(), torch.device("cpu"))


def predicted(tokens: torch.Tensor, index: torch.Tensor, whole: list[list[int]]) -> list[int]:
    """The tokens that follow the indexed positions, read off the whole sequences."""
    b = tokens.shape[0]
    return [whole[int(i) % b][int(i) // b + 1] for i in index]


@pytest.mark.parametrize("skip", [0, 1, 2, 9])
@pytest.mark.parametrize("multiple", [1, 4])
def test_both_sides_predict_the_same_response_tokens(skip: int, multiple: int) -> None:
    (micro,) = microbatches(Batch(SAMPLES, Weighting(skip=skip), multiple), 4)
    wanted = [token for x in SAMPLES for token in x.rollout.token_ids[skip:]]
    assert micro.response_ids.tolist() == wanted
    student = [x.student_prompt + x.rollout.token_ids for x in SAMPLES]
    teacher = [x.teacher_prompt + x.rollout.token_ids for x in SAMPLES]
    assert predicted(micro.student.tokens, micro.student.index, student) == wanted
    assert predicted(micro.teacher.tokens, micro.teacher.index, teacher) == wanted
    assert micro.student.tokens.shape[1] % multiple == micro.teacher.tokens.shape[1] % multiple == 0
    for row, sequence in zip(micro.student.tokens.tolist(), student, strict=True):
        assert row[: len(sequence) - 1] == sequence[:-1]
        assert not any(row[len(sequence) - 1 :])
    assert micro.rollout_logprobs.tolist() == pytest.approx([-0.1 * token for token in wanted])
    assert micro.count == len(wanted)


def test_weights_of_the_two_normalizations() -> None:
    (by_token,) = microbatches(Batch(SAMPLES), 4)
    assert by_token.token_weights.tolist() == [1.0] * 6
    (by_sequence,) = microbatches(Batch(SAMPLES, Weighting("sequence")), 4)
    assert by_sequence.token_weights.tolist() == pytest.approx([1 / 3] * 3 + [1] + [1 / 2] * 2)
    assert by_sequence.count == 3  # the empty response is no sequence to average
    assert by_sequence.sequence.tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("one_length", [False, True])
def test_ranks_and_micro_batches_share_the_samples_out(one_length: bool) -> None:
    batch = Batch(SAMPLES, one_length=one_length)
    seen, lengths = [], []
    for rank in range(2):
        for micro in microbatches(batch, 1, Group(rank, 2)):
            lengths.append((micro.student.tokens.shape[1], micro.teacher.tokens.shape[1]))
            seen += micro.sequence.tolist()
    assert sorted(seen) == [0, 0, 0, 1, 2, 2]
    assert lengths == ([(4, 6)] * 4 if one_length else [(4, 6), (4, 3), (1, 1), (0, 1)])


def test_a_micro_batch_without_response_tokens() -> None:
    micro = microbatches(Batch(SAMPLES), 1)[3]
    assert micro.count == 0
    for empty in (micro.student.index, micro.teacher.index, micro.response_ids, micro.token_weights, micro.sequence):
        assert empty.shape == (0,)
    assert micro.student.index.dtype == torch.long


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("multiple", [1, 4])
def test_packed_rows_hold_the_sequences_one_after_the_other(skip: int, multiple: int) -> None:
    batch = Batch(SAMPLES, Weighting(skip=skip), multiple, packing=True)
    micros = microbatches(batch, 2)
    assert len(micros) == 1  # 6 + 3 + 2 + 1 teacher tokens in room for twice the longest
    (micro,) = micros
    order = [0, 2, 1, 3]  # by decreasing length
    for side, sequences in zip(SIDES, (micro.student, micro.teacher), strict=True):
        whole = [token for i in order for token in SAMPLES[i].sequence(side)]
        row, boundaries = sequences.tokens[0].tolist(), sequences.boundaries
        assert row == whole + [0] * (-len(whole) % multiple)
        assert boundaries is not None
        lengths = [len(SAMPLES[i].sequence(side)) for i in order]
        assert boundaries.diff()[: len(order)].tolist() == lengths
        assert boundaries[-1] == len(row)
        followers = [*whole[1:], 0]
        last = {i: SAMPLES[i].rollout.token_ids[-1] for i in order if SAMPLES[i].rollout.token_ids}
        ends = boundaries.tolist()[1:]
        for k, i in enumerate(order):  # a sequence's last position predicts its last token, which it does not contain
            if i in last:
                followers[ends[k] - 1] = last[i]
        assert [followers[int(place)] for place in sequences.index] == micro.response_ids.tolist()
    assert micro.response_ids.tolist() == [token for i in order for token in SAMPLES[i].rollout.token_ids[skip:]]


def test_packing_has_as_many_micro_batches_on_every_rank_and_less_padding() -> None:
    long = [sample([1] * 9, [1] * 90, [2] * 10)] * 2
    short = [sample([1], [1], [2])] * 6
    samples = [long[0], short[0], long[1], *short[1:]]  # rank 0 has both long ones
    packed, padded = (Batch(samples, packing=packing) for packing in (True, False))
    plan = packed.assign(2, 2)
    assert [len(rank) for rank in plan] == [2, 2]
    assert sorted(i for rank in plan for numbers in rank for i in numbers) == list(range(8))
    assert all(i % 2 == rank for rank in range(2) for numbers in plan[rank] for i in numbers)
    assert padding_share(packed, plan) == 0
    assert padding_share(padded, padded.assign(4, 2)) > 0.4
    one_length = Batch(samples, one_length=True)
    assert padding_share(one_length, one_length.assign(1, 2)) > 0.7


def test_padding_of_a_packed_row_comes_in_pieces_no_longer_than_its_sequences() -> None:
    long, short = sample([1], [1], [2] * 9), sample([1], [1], [2] * 2)
    batch = Batch([long, long, long, short], one_length=True, packing=True)
    _, last = microbatches(batch, 2)  # 9 + 9 tokens, then 9 + 2 and what is missing to 18
    assert last.student.boundaries is not None
    assert last.student.boundaries.tolist() == [0, 9, 11, 18]
    alone = microbatches(Batch([long] * 2 + [short], one_length=True, packing=True), 2)[1]
    assert alone.student.boundaries is not None
    assert alone.student.boundaries.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize("packing", [False, True])
def test_fill_is_read_but_not_learned_from(normalization: Any, packing: bool) -> None:
    """Neither its tokens nor its sequences count, and there is no more of it than the layout needs."""
    assert fill_up(SAMPLES, 2) == SAMPLES
    filled, weighting = fill_up(SAMPLES[:3], 4), Weighting(normalization)
    assert [x.is_fill for x in filled] == [False, False, False, True]
    assert filled[3].rollout == SAMPLES[1].rollout  # the shortest
    (plain,) = microbatches(Batch(SAMPLES[:3], weighting), 3)
    batch = Batch(filled, weighting, packing=packing)
    found = [micro for rank in range(2) for micro in microbatches(batch, 2, Group(rank, 2))]
    assert sum(micro.count for micro in found) == plain.count
    tokens = sorted(token for micro in found for token in micro.response_ids.tolist())
    assert tokens == sorted(plain.response_ids.tolist())
    assert all(len(micro.token_weights) == len(micro.advantages) == len(micro.response_ids) for micro in found)
