r"""Student and teacher prompts as token ids.

Both are one user turn, rendered by the tokenizer's own chat template. The ids of the student's response are appended
to either prompt as the engine returned them, so position n of the response follows exactly the same response ids on
both sides; response text is never tokenised again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from megatron_opsd.config import ANSWER_TEMPLATE, STUDENT_TEMPLATE, TEACHER_TEMPLATE, Config, OpsdConfig
from megatron_opsd.errors import UserError
from megatron_opsd.files import AnyObject, excerpt, read_json, read_text
from megatron_opsd.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A problem may tokenize a little longer inside its prompt than alone.
SEAM_TOKENS = 16
# What is assumed of a final answer that a teacher is shown; solutions have a limit of their own.
ANSWER_TOKENS = 64
_QUESTION = "A question?"  # what is rendered to see how the chat template begins the assistant's turn

_PLACEHOLDER = re.compile(r"\{(problem|solution|answer)\}")


def check_templates(student: str, teacher: str, answer: str, section: str = "prompts") -> None:
    """Raise `UserError` unless the student's template shows the problem alone and the teacher's what they must."""
    for field, template, wanted in (
        ("student_template", student, {"problem"}),
        ("teacher_template", teacher, {"problem", "solution"}),
        ("answer_template", answer, {"problem", "answer"}),
    ):
        found = set(_PLACEHOLDER.findall(template))
        for name in sorted(wanted - found):
            raise UserError(f"{section}.{field} has no {{{name}}}: put {{{name}}} where the {name} belongs")
        for name in sorted(found - wanted):
            raise UserError(f"{section}.{field} contains {{{name}}}: it must not be seen here, take it out")


def fill(template: str, values: Mapping[str, str]) -> str:
    r"""Put values in place of `{problem}`, `{solution}` and `{answer}`; other braces, as in `\boxed{}`, stay.

    One pass: a problem whose own text contains `{solution}` is not expanded again.
    """
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True)
class PromptBuilder:
    r"""Turns examples into prompt ids for both sides.

    `student_thinking` and `teacher_thinking` are handed to the chat template as `enable_thinking`. `teacher_prefix` is
    text that opens the assistant's turn on the teacher's side only (such as `<think>\n`, or an empty think block); it
    is tokenised by itself and appended, so it can never merge with the response's first token. None stands for what
    makes both sides begin alike: a template that closes an empty think block for the student gets the teacher one too.

    Raises `UserError` for templates without their placeholders and for a tokenizer without a chat template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    student_template: str = STUDENT_TEMPLATE
    teacher_template: str = TEACHER_TEMPLATE
    answer_template: str = ANSWER_TEMPLATE
    student_thinking: bool = False
    teacher_thinking: bool = True
    teacher_prefix: str | None = None
    train_on_end_of_turn: bool | None = None
    skip_first_tokens: int = 0

    def __post_init__(self) -> None:
        check_templates(self.student_template, self.teacher_template, self.answer_template)
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self._where()}: the tokenizer has no chat template; use an instruction-tuned checkpoint, or put a "
                "chat_template.jinja beside the tokenizer"
            )

    def student(self, example: Example) -> list[int]:
        """Ids of the prompt that shows the problem only, up to where the response starts."""
        return self._render(fill(self.student_template, {"problem": example.problem}), self.student_thinking)

    def teacher(self, example: Example) -> list[int]:
        """Ids of the prompt that shows the reference solution too, with the teacher's prefix at its end."""
        return self._teacher(self.teacher_template, {"problem": example.problem, "solution": example.solution})

    def with_solution(self, example: Example) -> list[int]:
        """Ids of the teacher's prompt as it is put to a student: the response begins as after `student`."""
        text = fill(self.teacher_template, {"problem": example.problem, "solution": example.solution})
        return self._render(text, self.student_thinking)

    def teacher_with_answer(self, example: Example) -> list[int]:
        """The same with the final answer in place of the solution."""
        assert example.answer is not None
        return self._teacher(self.answer_template, {"problem": example.problem, "answer": example.answer})

    def solution(self, example: Example) -> list[int]:
        """Ids of the reference solution as a response, the end of the turn included."""
        if not self.tokenizer.eos_token:
            raise UserError(f"{self._where()}: the tokenizer has no eos_token, which ends a solution; name one")
        return self._encode(example.solution + str(self.tokenizer.eos_token))

    @cached_property
    def prefix(self) -> str:
        """What stands between the teacher's prompt and the response."""
        if self.teacher_prefix is not None:
            return self.teacher_prefix
        student, teacher = self._opening(self.student_thinking), self._opening(self.teacher_thinking)
        return student.removeprefix(teacher) if student.startswith(teacher) else ""

    @cached_property
    def openings(self) -> tuple[str, str]:
        """How the assistant's turn begins for the student and for the teacher, up to the response."""
        return self._opening(self.student_thinking), self._opening(self.teacher_thinking) + self.prefix

    @cached_property
    def untrained_at_start(self) -> int:
        """How many of a response's first tokens are not trained on.

        Besides `skip_first_tokens`: a student that thinks opens its think block itself. A teacher whose template has
        closed one already does not expect that, and no prefix can change it.
        """
        student, teacher = self.openings
        if self.teacher_prefix is not None or student == teacher or not teacher.startswith(student):
            return self.skip_first_tokens
        opened = teacher.removeprefix(student).splitlines(keepends=True)[0]
        return max(self.skip_first_tokens, len(self._encode(opened)))

    @cached_property
    def trains_on_end_of_turn(self) -> bool:
        """Whether the token that ends a response is trained on.

        By default it is, unless the teacher is inside of a think block and the student is not: there the teacher
        expects the block's end, and a student that learned this would not stop.
        """
        if self.train_on_end_of_turn is not None:
            return self.train_on_end_of_turn
        student, teacher = self.openings
        return _thinks(student) or not _thinks(teacher)

    def _opening(self, thinking: bool) -> str:
        """What the chat template puts behind a user's turn: the beginning of the assistant's."""
        return self.render_chat([{"role": "user", "content": _QUESTION}], thinking).rpartition(_QUESTION)[2]

    def read_response(self, token_ids: list[int]) -> str:
        """A response as text that can be shown as a solution: without its thoughts, if it says something after them."""
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
        return text.rpartition("</think>")[2].strip() or text

    def _teacher(self, template: str, values: Mapping[str, str]) -> list[int]:
        return self._render(fill(template, values), self.teacher_thinking) + self._encode(self.prefix)

    def _render(self, text: str, thinking: bool) -> list[int]:
        turn = self.render_chat([{"role": "user", "content": text}], thinking)
        if text.strip() not in turn:
            raise UserError(
                f"{self._where()}: the chat template leaves out what the prompt says ({excerpt(text)}); use the "
                "template of an instruction-tuned checkpoint that shows a turn's text as it is"
            )
        return self._encode(turn)

    def render_chat(self, messages: list[dict[str, str]], thinking: bool, add_generation_prompt: bool = True) -> str:
        """The chat template's text. Raises `UserError` where the template fails."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=thinking,
                )
            )
        except (
            TemplateError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self._where()}: the chat template fails ({reason}); put one that works, as chat_template.jinja, "
                "beside the tokenizer"
            ) from error

    def _where(self) -> str:
        return str(self.tokenizer.name_or_path or "the tokenizer")

    def _encode(self, text: str) -> list[int]:
        # The chat template writes every special token itself: the tokenizer must not add its own.
        return self.tokenizer.encode(text, add_special_tokens=False)


def _thinks(opening: str) -> bool:
    """Whether a turn that begins like this is inside of a think block."""
    return opening.rfind("<think>") > opening.rfind("</think>")


def build_prompts(config: Config) -> PromptBuilder:
    """Load the model's tokenizer and bind it to the configured templates. Raises `UserError` where either is unfit."""
    from transformers import AutoTokenizer  # here, because it takes seconds to load

    _check_tokenizer_files(Path(config.model.path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    except Exception as error:  # tokenizers has no other type for a file that it does not understand
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.path = '{config.model.path}': its tokenizer cannot be loaded ({reason}); "
            "copy the tokenizer files of the original checkpoint there"
        ) from error
    return PromptBuilder(
        tokenizer,
        student_template=config.prompts.student_template,
        teacher_template=config.prompts.teacher_template,
        answer_template=config.prompts.answer_template,
        student_thinking=config.prompts.student_thinking,
        teacher_thinking=config.prompts.teacher_thinking,
        teacher_prefix=config.prompts.teacher_prefix,
        train_on_end_of_turn=config.prompts.train_on_end_of_turn,
        skip_first_tokens=config.prompts.skip_first_tokens,
    )


class _TokenizerConfig(AnyObject):
    model_max_length: int | float | None = None
    eos_token: str | dict[str, Any] | None = None
    chat_template: str | list[Any] | dict[str, Any] | None = None


def _check_tokenizer_files(model: Path) -> None:
    """Raise `UserError` where a file is broken: transformers would pass over it, or name neither file nor place."""
    remedy = "copy the tokenizer files of the original checkpoint there"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (model / name).exists():
            read_json(model / name, _TokenizerConfig if name == "tokenizer_config.json" else AnyObject, remedy)
    if (model / "chat_template.jinja").exists():
        read_text(model / "chat_template.jinja", remedy)


def max_model_len(config: Config, prompts: PromptBuilder, train: bool = True) -> int:
    """Tokens of the longest prompt and response that the limits allow the engine, in training and evaluation.

    train: False for an evaluation alone.
    """
    nothing, data, response = Example(0, "", ""), config.data, config.rollout.max_response_tokens
    alone = len(prompts.student(nothing)) + SEAM_TOKENS
    longest = alone + data.max_problem_tokens + response
    if train and config.method.writes_in_sight:
        template = len(prompts.with_solution(nothing)) + SEAM_TOKENS
        longest = max(longest, template + data.max_problem_tokens + data.max_solution_tokens + response)
    if config.evaluate.data:
        response = config.evaluate.max_response_tokens or response
        longest = max(longest, alone + config.evaluate.data.max_problem_tokens + response)
    return longest


def context_tokens(config: Config) -> int:
    """Tokens of the longest text that a teacher is shown besides the problem."""
    match config.method.teacher_sees:
        case "nothing":
            return 0
        case "answer":
            return ANSWER_TOKENS
        case "solution":
            by_data = config.data.max_solution_tokens if config.reads == "solution" else 0
            has_siblings = isinstance(config.method, OpsdConfig) and config.method.context == "sibling"
            return max(by_data, config.rollout.max_response_tokens if has_siblings else 0)
