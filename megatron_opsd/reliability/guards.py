"""Bounds beyond which a run has gone wrong. A guard warns first and then ends the run.

On-Policy Self-Distillation is known to collapse after 100 to 200 steps (arXiv 2601.18734 stops before): the entropy
falls or explodes, responses shrink or reach the limit, held-out accuracy drops. A run may also never start to learn:
if its steps are more noise than signal, the student becomes less sure than its teacher and comes no nearer to it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_opsd.config import GuardsConfig
from megatron_opsd.errors import RunStoppedError
from megatron_opsd.types import Evaluation

EVALUATION_PATIENCE = 2
WINDOW = 5  # steps of the means in which a loss may fall while the divergence rises
LEARNING = ("divergence", "entropy_student", "entropy_teacher")  # metrics that tell whether the student learns


@dataclass
class _State:
    """What the guards remember; part of every checkpoint."""

    skipped: int = 0  # in a row
    beyond: dict[str, int] = field(default_factory=dict)  # steps in a row, by metric
    best_step: int | None = None
    best_accuracy: float = -1.0
    at_first: dict[str, float] = field(default_factory=dict)  # means of LEARNING over the run's first steps
    window: list[dict[str, float]] = field(default_factory=list)  # LEARNING of the steps since the last comparison
    first_losses: list[list[float]] = field(default_factory=list)  # loss and divergence of the first WINDOW steps
    last_losses: list[list[float]] = field(default_factory=list)  # of the last ones
    apart: int = 0  # steps in a row in which their means went apart


class Guards:
    """Checks every step's metrics and every evaluation. These are the same on all ranks, so all ranks decide alike."""

    def __init__(self, config: GuardsConfig, state: Mapping[str, Any] | None = None) -> None:
        """state: from ``state_dict``, if the run resumes."""
        self._config, self._state = config, _State(**(state or {}))
        self._bounds = {
            "entropy_student": (config.min_entropy, config.max_entropy, "entropy"),
            "response_length": (config.min_response_length, config.max_response_length, "response_length"),
        }

    @property
    def best_step(self) -> int | None:
        """The step with the highest held-out accuracy."""
        return self._state.best_step

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """Check a step and return warnings.

        Raises:
            RunStoppedError: too many steps in a row were skipped or beyond a bound.
        """
        self._count_skipped(metrics)
        warnings = []
        for name, (low, high, setting) in self._bounds.items():
            value, bound = metrics.get(name), None
            if value is None:  # a step that learned nothing
                continue
            if low is not None and not value >= low:
                bound = f"below guards.min_{setting} = {low:g}"
            elif high is not None and not value <= high:
                bound = f"above guards.max_{setting} = {high:g}"
            found = f"step {metrics['step']}: {name} {value:.4g} is {bound}"
            warnings += self._count(name, found if bound else None, self._config.patience, "steps")
        if self._config.watch_learning:
            warnings += self._compare_with_first_steps(metrics) + self._compare_loss_with_divergence(metrics)
        return warnings

    def evaluation(self, step: int, evaluation: Evaluation) -> list[str]:
        """Check an evaluation and return warnings; remembers the best one.

        Raises:
            RunStoppedError: the accuracy has stayed too far below the best.
        """
        state, drop = self._state, self._config.max_accuracy_drop
        if evaluation.greedy > state.best_accuracy:
            state.best_step, state.best_accuracy = step, evaluation.greedy
        found = None
        if drop is not None and evaluation.greedy < state.best_accuracy - drop:
            found = (
                f"step {step}: held-out accuracy {evaluation.greedy:.3f} is more than guards.max_accuracy_drop = "
                f"{drop:g} below the best, {state.best_accuracy:.3f} of step {state.best_step}"
            )
        return self._count("accuracy", found, EVALUATION_PATIENCE, "evaluations")

    def _count(self, name: str, found: str | None, patience: int, what: str) -> list[str]:
        beyond = self._state.beyond[name] = self._state.beyond.get(name, 0) + 1 if found else 0
        if found and beyond >= patience:
            raise RunStoppedError(f"{found}, for {beyond} {what} in a row: the run has collapsed; {self._advice()}")
        return [f"{found} ({beyond} of {patience} {what} in a row)"] if found else []

    def _compare_with_first_steps(self, metrics: Mapping[str, float]) -> list[str]:
        """Check, every ``patience`` steps, whether the student has come nearer to its teacher or is only less sure."""
        state = self._state
        if any(name not in metrics for name in LEARNING):  # no teacher, or nothing learned
            return []
        values = {name: metrics[name] for name in LEARNING}
        if not metrics["skipped"] and all(map(math.isfinite, values.values())):
            state.window.append(values)
        if len(state.window) < self._config.patience:
            return []
        now = {name: sum(step[name] for step in state.window) / len(state.window) for name in LEARNING}
        state.window = []
        first = state.at_first = state.at_first or now
        # Both entropies are of the same tokens: their difference does not depend on how hard a step's problems are.
        less_sure = now["entropy_student"] - now["entropy_teacher"]
        less_sure_at_first = first["entropy_student"] - first["entropy_teacher"]
        if less_sure <= max(0.0, less_sure_at_first) or now["divergence"] < first["divergence"]:
            return []
        return [
            f"step {metrics['step']}: the student may not be learning: over {self._config.patience} steps its "
            f"divergence from the teacher is {now['divergence']:.3g} (first steps: {first['divergence']:.3g}), and its "
            f"entropy {now['entropy_student']:.3g} has gone past the teacher's {now['entropy_teacher']:.3g}; start "
            'again with a lower optim.lr, a larger train.global_batch_size, or without objective.clip_mode = "entry"'
        ]

    def _compare_loss_with_divergence(self, metrics: Mapping[str, float]) -> list[str]:
        """Check whether the loss falls only because of its clip, while the divergence itself rises."""
        state, now = self._state, [metrics.get("loss", math.nan), metrics.get("divergence", math.nan)]
        if metrics["skipped"] or not all(map(math.isfinite, now)):
            return []
        if len(state.first_losses) < WINDOW:
            state.first_losses.append(now)
            return []
        state.last_losses = [*state.last_losses, now][-WINDOW:]
        if len(state.last_losses) < WINDOW:
            return []
        (loss, divergence), (loss_at_first, at_first) = _means(state.last_losses), _means(state.first_losses)
        state.apart = state.apart + 1 if loss < loss_at_first and divergence > at_first else 0
        if state.apart != self._config.patience:
            return []
        return [
            f"step {metrics['step']}: the loss falls while the divergence rises: means of {WINDOW} steps, "
            f"{loss_at_first:.3g} -> {loss:.3g} and {at_first:.3g} -> {divergence:.3g}, {state.apart} times in a row. "
            "The clip hides that the student goes away from its teacher; start again with objective.clip_mode = "
            '"saturate"'
        ]

    def _count_skipped(self, metrics: Mapping[str, float]) -> None:
        self._state.skipped = self._state.skipped + 1 if metrics["skipped"] else 0
        if self._state.skipped > self._config.max_skipped_steps:
            raise RunStoppedError(
                f"step {metrics['step']}: loss or gradient was not finite for {self._state.skipped} steps in a row "
                f"(guards.max_skipped_steps = {self._config.max_skipped_steps}); their batches are in skipped/; "
                + self._advice()
            )

    def _advice(self) -> str:
        if not self._state.best_step:
            return "use an earlier checkpoint, or start again with a lower optim.lr"
        best = f"step {self._state.best_step} (held-out accuracy {self._state.best_accuracy:.3f})"
        return f"use the best checkpoint, {best}, or start again with a lower optim.lr"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)


def _means(steps: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(steps) for values in zip(*steps, strict=True)]
