"""[method]: where responses come from, and which are learned from. Each kind has its own fields."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from megatron_opsd.config.section import Section
from megatron_opsd.types import Grade

Reads = Literal["problem", "answer", "solution"]  # what a row of the data must have; each includes the problem


class _Method(Section):
    """What all kinds say of themselves."""

    has_teacher: ClassVar[bool]
    writes_rollouts: ClassVar[bool]  # whether the student writes responses in every step

    @property
    def reads(self) -> Reads:
        """What a row of the data must have."""
        return "solution"

    @property
    def teacher_sees(self) -> Literal["nothing", "answer", "solution"]:
        """What a teacher is shown besides the problem."""
        return "nothing"

    @property
    def writes_in_sight(self) -> bool:
        """Whether the engine also writes with the solution in sight."""
        return False

    @property
    def samples_responses(self) -> bool:
        """Whether what is learned from is the model's own, be it the student's or the teacher's."""
        return self.writes_rollouts or self.writes_in_sight

    @property
    def reads_grades(self) -> bool:
        """Whether it matters which responses are right."""
        return set(self.learns_from) != set(Grade)

    @property
    def samples_tokens(self) -> bool:
        """Whether the loss is a policy gradient, which is unbiased only for tokens of its own distribution."""
        return False

    @property
    def learns_from(self) -> list[Grade]:
        """The grades of responses that may be learned from."""
        return list(Grade)


class OpsdConfig(_Method):
    has_teacher: ClassVar[bool] = True
    writes_rollouts: ClassVar[bool] = True
    kind: Literal["opsd"] = "opsd"
    """The method: `opsd`, On-Policy Self-Distillation; `grpo`, reinforcement learning by groups; `star`, fine-tuning on
    the student's right answers; `sft`, on the data's solutions; `distill`, off-policy distillation."""
    loss: Literal["divergence", "sampled_token"] = "divergence"
    """Of `opsd`. `divergence` compares whole distributions ([objective]); `sampled_token` is the policy gradient of the
    sampled tokens, with log q - log p as their advantages."""
    context: Literal["solution", "answer", "sibling", "shuffled", "nothing"] = "solution"
    """Of `opsd`. What the teacher sees besides the problem: the reference solution, its final answer alone, or
    `sibling`, another right response of the student. Controls: `shuffled`, another problem's solution; `nothing`, the
    student's prompt."""
    no_sibling: Literal["solution", "skip"] = "solution"
    """Of `opsd` with context `sibling`, where a response has none: show the reference solution, or learn nothing from
    the response."""
    train_on: list[Annotated[Grade, Field(strict=False)]] = list(Grade)  # noqa: RUF012 - pydantic copies it
    """Of `opsd`. Which responses are learned from. `unfinished` ones were cut at the limit; `unknown`: the data has no
    answer. Such as ["right", "wrong"]."""

    @property
    def reads(self) -> Reads:
        if self.context in ("solution", "shuffled") or (self.context == "sibling" and self.no_sibling == "solution"):
            return "solution"
        needs_answer = self.context in ("answer", "sibling") or Grade.UNKNOWN not in self.train_on
        return "answer" if needs_answer else "problem"

    @property
    def teacher_sees(self) -> Literal["nothing", "answer", "solution"]:
        return self.context if self.context in ("nothing", "answer") else "solution"

    @property
    def reads_grades(self) -> bool:
        return self.context == "sibling" or super().reads_grades

    @property
    def samples_tokens(self) -> bool:
        return self.loss == "sampled_token"

    @property
    def learns_from(self) -> list[Grade]:
        return self.train_on


class GrpoConfig(_Method):
    has_teacher: ClassVar[bool] = False
    writes_rollouts: ClassVar[bool] = True
    kind: Literal["grpo"] = "grpo"
    """Group Relative Policy Optimization."""
    scale_by_std: bool = True
    """Of `grpo`. Divide a group's advantages by the standard deviation of its rewards."""
    drop_groups_without_signal: bool = False
    """Of `grpo`. Leave groups whose rewards are all equal out of the divisor too; they have no gradient either way."""

    @property
    def reads(self) -> Reads:
        return "answer"

    @property
    def reads_grades(self) -> bool:
        return True

    @property
    def samples_tokens(self) -> bool:
        return True


class StarConfig(_Method):
    has_teacher: ClassVar[bool] = False
    writes_rollouts: ClassVar[bool] = True
    kind: Literal["star"] = "star"
    """Self-Taught Reasoner."""
    rationalize: bool = True
    """Of `star`. Let the student answer once more, with the solution in sight, where it failed; learn from these
    answers if they are right."""

    @property
    def reads(self) -> Reads:
        return "solution" if self.rationalize else "answer"

    @property
    def writes_in_sight(self) -> bool:
        return self.rationalize

    @property
    def learns_from(self) -> list[Grade]:
        return [Grade.RIGHT]


class SftConfig(_Method):
    has_teacher: ClassVar[bool] = False
    writes_rollouts: ClassVar[bool] = False
    kind: Literal["sft"] = "sft"
    """Supervised fine-tuning."""


class DistillConfig(_Method):
    has_teacher: ClassVar[bool] = True
    writes_rollouts: ClassVar[bool] = False
    kind: Literal["distill"] = "distill"
    """Off-policy distillation."""
    responses: Literal["teacher", "data"] = "teacher"
    """Of `distill`. `teacher`: what the initial weights write with the solution in sight, once, before the first step.
    `data`: the data's solutions."""

    @property
    def teacher_sees(self) -> Literal["nothing", "answer", "solution"]:
        return "solution"

    @property
    def writes_in_sight(self) -> bool:
        return self.responses == "teacher"


def _method_kind(method: Any) -> Any:
    return method.get("kind", "opsd") if isinstance(method, dict) else getattr(method, "kind", None)


MethodConfig = Annotated[
    Annotated[OpsdConfig, Tag("opsd")]
    | Annotated[GrpoConfig, Tag("grpo")]
    | Annotated[StarConfig, Tag("star")]
    | Annotated[SftConfig, Tag("sft")]
    | Annotated[DistillConfig, Tag("distill")],
    Discriminator(_method_kind),
]
