"""Alignment, padding and counting of micro-batches, on sequences a person can check."""

import pytest
import torch
import torch.distributed as dist

from megatron_opsd.batch import Batch, Microbatch, Sample, build_batch, split
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


def microbatches(batch: Batch, size: int, group: Group | None = None, normalization: str = "token") -> list[Microbatch]:
    stand_in: dist.ProcessGroup = group or Group()  # type: ignore[assignment]
    return split(batch, size, stand_in, normalization, torch.device("cpu"))  # type: ignore[arg-type]


def predicted(tokens: torch.Tensor, index: torch.Tensor, whole: list[list[int]]) -> list[int]:
    """The tokens that follow the indexed positions, read off the whole sequences."""
    b = tokens.shape[0]
    return [whole[int(i) % b][int(i) // b + 1] for i in index]


@pytest.mark.parametrize("skip", [0, 1, 2, 9])
@pytest.mark.parametrize("multiple", [1, 4])
def test_both_sides_predict_the_same_response_tokens(skip: int, multiple: int) -> None:
    (micro,) = microbatches(build_batch(SAMPLES, skip, multiple), 4)
    wanted = [token for x in SAMPLES for token in x.rollout.token_ids[skip:]]
    assert micro.response_ids.tolist() == wanted
    student = [x.student_prompt + x.rollout.token_ids for x in SAMPLES]
    teacher = [x.teacher_prompt + x.rollout.token_ids for x in SAMPLES]
    assert predicted(micro.student_tokens, micro.student_index, student) == wanted
    assert predicted(micro.teacher_tokens, micro.teacher_index, teacher) == wanted
    assert micro.student_tokens.shape[1] % multiple == micro.teacher_tokens.shape[1] % multiple == 0
    for row, sequence in zip(micro.student_tokens.tolist(), student, strict=True):
        assert row[: len(sequence) - 1] == sequence[:-1]
        assert not any(row[len(sequence) - 1 :])
    assert micro.rollout_logprobs.tolist() == pytest.approx([-0.1 * token for token in wanted])
    assert micro.count == len(wanted)


def test_weights_of_the_two_normalizations() -> None:
    batch = build_batch(SAMPLES)
    (by_token,) = microbatches(batch, 4)
    assert by_token.token_weights.tolist() == [1.0] * 6
    (by_sequence,) = microbatches(batch, 4, normalization="sequence")
    assert by_sequence.token_weights.tolist() == pytest.approx([1 / 3] * 3 + [1] + [1 / 2] * 2)
    assert by_sequence.count == 3  # the empty response is no sequence to average
    assert by_sequence.sequence.tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("one_length", [False, True])
def test_ranks_and_micro_batches_share_the_samples_out(one_length: bool) -> None:
    batch = build_batch(SAMPLES, one_length=one_length)
    assert (batch.student_length, batch.teacher_length) == (4, 6)
    seen, lengths = [], []
    for rank in range(2):
        for micro in microbatches(batch, 1, Group(rank, 2)):
            lengths.append((micro.student_tokens.shape[1], micro.teacher_tokens.shape[1]))
            seen += micro.sequence.tolist()
    assert sorted(seen) == [0, 0, 0, 1, 2, 2]
    assert lengths == ([(4, 6)] * 4 if one_length else [(4, 6), (4, 3), (1, 1), (0, 1)])


def test_a_micro_batch_without_response_tokens() -> None:
    micro = microbatches(build_batch(SAMPLES), 1)[3]
    assert micro.count == 0
    for empty in (micro.student_index, micro.teacher_index, micro.response_ids, micro.token_weights, micro.sequence):
        assert empty.shape == (0,)
    assert micro.student_index.dtype == torch.long
