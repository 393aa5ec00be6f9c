"""Guards warn, remember over a checkpoint, and end a run with the step to go back to."""

import json

import pytest

from megatron_opsd.config import GuardsConfig
from megatron_opsd.errors import RunStoppedError
from megatron_opsd.reliability.guards import Guards
from megatron_opsd.types import Evaluation


def metrics(step: int, entropy: float = 1.0, length: float = 100.0, skipped: int = 0, divergence: float = 0.1) -> dict:
    values = {"step": step, "entropy_student": entropy, "response_length": length, "skipped": skipped}
    return values | {"entropy_teacher": 2.0, "divergence": divergence}


def accuracy(value: float) -> Evaluation:
    return Evaluation(greedy=value, average=0.0, response_length=0.0, records=[])


def test_without_bounds_nothing_is_said() -> None:
    guards = Guards(GuardsConfig())
    assert [guards.step(metrics(i, entropy=0.0, length=1.0)) for i in range(20)] == [[]] * 20
    assert guards.evaluation(1, accuracy(0.9)) == guards.evaluation(2, accuracy(0.0)) == []


@pytest.mark.parametrize(
    ("bounds", "bad", "words"),
    [
        ({"min_entropy": 0.1}, {"entropy": 0.05}, "entropy_student 0.05 is below guards.min_entropy = 0.1"),
        ({"max_entropy": 3.0}, {"entropy": 4.0}, "entropy_student 4 is above guards.max_entropy = 3"),
        ({"min_response_length": 10.0}, {"length": 9.0}, "response_length 9 is below guards.min_response_length = 10"),
        ({"max_response_length": 900.0}, {"length": 1e3}, "response_length 1000 is above guards.max_response_length"),
        ({"min_entropy": 0.1}, {"entropy": float("nan")}, "entropy_student nan is below guards.min_entropy"),
    ],
)
def test_a_bound_warns_forgets_and_ends_the_run(bounds: dict, bad: dict, words: str) -> None:
    guards = Guards(GuardsConfig(patience=3, **bounds))
    assert guards.step(metrics(1)) == []
    for step in (2, 3):
        (warning,) = guards.step(metrics(step, **bad))
        assert warning.startswith(f"step {step}: {words}")
        assert f"({step - 1} of 3 steps in a row)" in warning
    assert guards.step(metrics(4)) == []  # one good step, and counting starts again
    guards.step(metrics(5, **bad))
    resumed = Guards(GuardsConfig(patience=3, **bounds), json.loads(json.dumps(guards.state_dict())))
    resumed.step(metrics(6, **bad))
    with pytest.raises(RunStoppedError, match=r"^step 7: .* for 3 steps in a row: .* collapsed; use an earlier"):
        resumed.step(metrics(7, **bad))


def test_an_accuracy_that_stays_low_names_the_best_step() -> None:
    guards = Guards(GuardsConfig(max_accuracy_drop=0.1))
    for step, value in ((0, 0.3), (10, 0.6), (20, 0.55)):
        assert guards.evaluation(step, accuracy(value)) == []
    assert guards.best_step == 10
    (warning,) = guards.evaluation(30, accuracy(0.4))
    assert "more than guards.max_accuracy_drop = 0.1 below the best, 0.600 of step 10" in warning
    with pytest.raises(RunStoppedError, match=r"use the best checkpoint, step 10 \(held-out accuracy 0\.600\)"):
        guards.evaluation(40, accuracy(0.45))


def test_skipped_steps_in_a_row_end_the_run() -> None:
    guards = Guards(GuardsConfig(max_skipped_steps=1))
    for step, skipped in ((1, 1), (2, 0), (3, 1)):
        guards.step(metrics(step, skipped=skipped))
    with pytest.raises(RunStoppedError, match=r"not finite for 2 steps in a row \(guards.max_skipped_steps = 1\)"):
        guards.step(metrics(4, skipped=1))


def less_sure(guards: Guards, steps: range, **values: float) -> list[str]:
    return [warning for step in steps for warning in guards.step(metrics(step, **values))]


def test_a_student_that_becomes_less_sure_and_comes_no_nearer_is_told_of() -> None:
    guards = Guards(GuardsConfig(patience=3))
    assert less_sure(guards, range(1, 4)) == []  # to compare with
    assert less_sure(guards, range(4, 7), entropy=1.9, divergence=0.2) == []  # surer than the teacher's 2.0
    resumed = Guards(GuardsConfig(patience=3), json.loads(json.dumps(guards.state_dict())))
    (warning,) = less_sure(resumed, range(7, 10), entropy=2.5, divergence=0.1)
    assert warning.startswith(
        "step 9: the student may not be learning: over 3 steps its divergence from the teacher is 0.1 ("
    )
    assert "its entropy 2.5 has gone past the teacher's 2; start again with a lower optim.lr" in warning
    assert less_sure(resumed, range(10, 13), entropy=2.5, divergence=0.09) == []
    assert less_sure(resumed, range(13, 16), entropy=2.5, divergence=0.5, skipped=1) == []  # changed no weights


def test_a_student_that_was_less_sure_from_the_start_is_not() -> None:
    guards = Guards(GuardsConfig(patience=3))
    assert less_sure(guards, range(1, 7), entropy=2.5) == []


def test_a_step_that_cannot_be_measured_does_not_count() -> None:
    guards = Guards(GuardsConfig(patience=3))
    assert less_sure(guards, range(1, 3)) == less_sure(guards, range(3, 4), divergence=float("inf")) == []
    assert less_sure(guards, range(4, 5)) == less_sure(guards, range(5, 8), entropy=2.5, divergence=0.05) == []
    (warning,) = less_sure(guards, range(8, 11), entropy=2.5, divergence=0.2)
    assert "(first steps: 0.1)" in warning


def test_learning_need_not_be_watched() -> None:
    guards = Guards(GuardsConfig(patience=3, watch_learning=False))
    assert less_sure(guards, range(1, 4)) == less_sure(guards, range(4, 7), entropy=2.5, divergence=0.3) == []


def test_a_loss_that_falls_while_the_divergence_rises() -> None:
    """Means of five steps against the first five; a warning after `patience` of them in a row, and once."""

    def step(guards: Guards, number: int, loss: float, divergence: float) -> list[str]:
        return guards.step(metrics(number, entropy=0.1, divergence=divergence) | {"loss": loss})

    guards = Guards(GuardsConfig(patience=3))
    for number in range(1, 6):
        assert step(guards, number, 0.10, 0.20) == []
    for number in range(6, 12):  # the means are whole at step 10; then two in a row
        assert step(guards, number, 0.09, 0.21) == []
    resumed = Guards(GuardsConfig(patience=3), json.loads(json.dumps(guards.state_dict())))
    (warning,) = step(resumed, 12, 0.08, 0.21)
    assert "step 12: the loss falls while the divergence rises" in warning
    assert "0.1 -> 0.088 and 0.2 -> 0.21, 3 times in a row" in warning
    assert 'objective.clip_mode = "saturate"' in warning
    assert step(resumed, 13, 0.08, 0.21) == []
    guards = Guards(GuardsConfig(patience=1))
    for number in range(1, 30):  # both fall; one step that was skipped counts for nothing
        assert step(guards, number, 0.1 / number, 0.2 / number) == []
        assert guards.step(metrics(number, skipped=1, divergence=9.0) | {"loss": 0.0}) == []
    for number in range(30, 60):  # both rise again
        assert step(guards, number, number, number) == []
    assert Guards(GuardsConfig(watch_learning=False)).step(metrics(1) | {"loss": 0.0}) == []
