"""Weights of tokens and the divisor, by hand."""

import itertools
from typing import Any

import pytest

from megatron_opsd.data.weighting import Weighting
from megatron_opsd.types import Rollout


def response(tokens: int, finish_reason: str = "stop") -> Rollout:
    return Rollout([1] * tokens, [], finish_reason, 0)


@pytest.mark.parametrize(
    ("weighting", "weights", "count"),
    [
        (Weighting(), [1, 1, 1, 1], 4),
        (Weighting("sequence"), [0.25] * 4, 1),
        (Weighting("constant", longest=8), [0.125] * 4, 1),
        (Weighting(position="rising"), [0.25, 0.75, 1.25, 1.75], 4),
        (Weighting(position="falling"), [1.75, 1.25, 0.75, 0.25], 4),
        (Weighting("sequence", position="rising", skip=2), [0.25, 0.75], 1),
        (Weighting(skip=3), [1], 1),
        (Weighting(skip=9), [], 0),
        (Weighting("sequence", skip=9), [], 0),
        (Weighting("constant", longest=8, skip=9), [], 1),
        (Weighting(train_on_end_of_turn=False), [1, 1, 1, 0], 3),
        (Weighting("sequence", train_on_end_of_turn=False, skip=2), [1, 0], 1),
        (Weighting("sequence", train_on_end_of_turn=False, skip=3), [0], 0),
        (Weighting(position="rising", train_on_end_of_turn=False), [1 / 3, 1, 5 / 3, 0], 3),
    ],
)
def test_by_hand(weighting: Weighting, weights: list[float], count: int) -> None:
    assert weighting.weights(response(4)) == pytest.approx(weights)
    assert weighting.count(response(4)) == count
    assert weighting.measured(response(4)) == len(weights)


def test_a_response_that_was_cut_has_no_end_to_leave_out() -> None:
    weighting = Weighting(train_on_end_of_turn=False)
    assert weighting.weights(response(3, "length")) == [1, 1, 1]
    assert weighting.weights(response(0, "length")) == []


@pytest.mark.parametrize("tokens", [1, 2, 7, 100])
def test_places_leave_the_mean_alone(tokens: int) -> None:
    normalizations: Any = ("token", "sequence", "constant")
    for normalization, position in itertools.product(normalizations, ("rising", "falling")):
        even, placed = (Weighting(normalization, 50, place) for place in ("even", position))
        assert sum(placed.weights(response(tokens))) == pytest.approx(sum(even.weights(response(tokens))))
        assert placed.count(response(tokens)) == even.count(response(tokens))
