"""A curriculum: the easiest problems first, in a window that grows, and a state that goes on where it stopped."""

import json
import random
from collections.abc import Sequence

import pytest

from megatron_opsd.config import CurriculumConfig, TrainConfig
from megatron_opsd.data.curriculum import STEPS, CurriculumSampler, build_sampler
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.types import Example, Grade, Group, Rollout

RIGHT, WRONG, UNFINISHED, UNKNOWN = Grade.RIGHT, Grade.WRONG, Grade.UNFINISHED, Grade.UNKNOWN


def examples(difficulties: Sequence[float | None]) -> list[Example]:
    return [Example(10 + i, f"Problem {i}", "", "1", difficulty) for i, difficulty in enumerate(difficulties)]


def sampler(difficulties: Sequence[float | None], **settings: float) -> CurriculumSampler:
    return CurriculumSampler(examples(difficulties), 0, CurriculumConfig(**settings))


def answered(some: Sequence[Example], *grades: Grade, in_sight: bool = False) -> list[Group]:
    rollouts = [Rollout([1], [], "stop", 0) for _ in grades]
    return [Group(example, [0], rollouts, list(grades), in_sight) for example in some]


def draw_epoch(drawing: Sampler, size: int) -> list[int]:
    return sorted(example.index - 10 for example in drawing.next_batch(size))


def test_the_window_is_the_easiest_share_and_ties_go_by_index() -> None:
    drawing = sampler([3, 1, 2, 1, 1, 5, 0, 4], window=0.5)
    for _ in range(3):  # each epoch, each once
        assert draw_epoch(drawing, 4) == [1, 3, 4, 6]
    assert draw_epoch(sampler([1, 1, 1, 1], window=0.3), 2) == [0, 1]  # rounded up
    assert draw_epoch(sampler([None] * 4, window=0.5), 2) == [0, 1]  # nothing is known yet


def test_it_grows_when_a_mean_of_five_steps_exceeds_the_accuracy() -> None:
    drawing = sampler([0, 1, 2, 3], window=0.25, growth=0.5, accuracy=0.5)
    for step in range(STEPS):
        assert drawing.window == 0.25
        # Two of four are right: no more than half.
        drawing.update(answered(drawing.next_batch(1), RIGHT, RIGHT, WRONG, UNFINISHED))
        assert step < STEPS
    assert drawing.window == 0.25
    drawing.update(answered(drawing.next_batch(1), RIGHT, RIGHT, RIGHT, WRONG))
    assert drawing.window == 0.75
    assert draw_epoch(drawing, 3) == [0, 1, 2]  # a new epoch has begun
    for _ in range(STEPS):
        assert drawing.window == 0.75  # five more steps with this window
        drawing.update(answered(drawing.next_batch(1), RIGHT))
    assert drawing.window == 1
    drawing.update(answered(drawing.next_batch(1), RIGHT))
    assert drawing.window == 1


def test_without_a_difficulty_pass_rates_decide() -> None:
    drawing = sampler([None] * 4, window=0.5, accuracy=0.99)
    first, second = sorted(drawing.next_batch(2), key=lambda example: example.index)
    drawing.update(answered([first], WRONG, WRONG, WRONG, WRONG))
    drawing.update(answered([second], RIGHT, RIGHT, RIGHT, WRONG))
    # The second is easier than the mean, which stands for those that were never asked; the first is harder.
    assert draw_epoch(drawing, 2) == [1, 2]


def test_what_says_nothing_about_the_student_does_not_count() -> None:
    drawing = sampler([None] * 4, window=0.5, accuracy=0.0)
    before = drawing.state_dict()
    drawing.update(answered(examples([None] * 4)[:2], UNKNOWN, UNKNOWN))
    drawing.update(answered(examples([None] * 4)[:2], RIGHT, in_sight=True))
    assert drawing.state_dict() == before


@pytest.mark.parametrize("known", [True, False])
def test_interrupted_at_any_step_it_draws_as_if_it_was_not(known: bool) -> None:
    difficulties = [random.Random(i).random() if known else None for i in range(40)]
    settings = {"window": 0.2, "growth": 0.2, "accuracy": 0.6}

    def step(drawing: CurriculumSampler, number: int) -> list[int]:
        some = drawing.next_batch(3)
        chance = random.Random(number)
        for example in some:
            drawing.update(answered([example], *(RIGHT if chance.random() < 0.8 else WRONG for _ in range(4))))
        return [example.index for example in some]

    unbroken = sampler(difficulties, **settings)
    drawn, states = [], [json.dumps(unbroken.state_dict())]
    for number in range(40):
        drawn.append(step(unbroken, number))
        states.append(json.dumps(unbroken.state_dict()))
    assert unbroken.window > 0.2
    for stop in range(0, 40, 3):
        again = sampler(difficulties, **settings)
        again.load_state_dict(json.loads(states[stop]))
        assert [step(again, number) for number in range(stop, 40)] == drawn[stop:]


def test_the_state_is_of_its_moment() -> None:
    drawing = sampler([None] * 4, window=0.5)
    some = drawing.next_batch(2)
    drawing.update(answered(some, WRONG))
    state = drawing.state_dict()
    text = json.dumps(state)
    drawing.update(answered(some, RIGHT))
    assert json.dumps(state) == text


def test_a_curriculum_that_is_added_to_a_run_begins() -> None:
    plain = Sampler(examples([1] * 8), 0)
    plain.next_batch(5)
    added = sampler([1] * 8, window=0.25)
    added.load_state_dict(plain.state_dict())
    assert draw_epoch(added, 2) == [0, 1]


def test_without_settings_there_is_none() -> None:
    some = examples([3, 1, 2, 0])
    assert type(build_sampler(some, TrainConfig())) is Sampler
    assert isinstance(build_sampler(some, TrainConfig(curriculum=CurriculumConfig())), CurriculumSampler)
    everything = CurriculumSampler(some, 0, CurriculumConfig(window=1.0))
    assert everything.next_batch(9) == Sampler(some, 0).next_batch(9)
