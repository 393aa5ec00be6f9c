"""[prompts]: their wording is configuration; data/prompts.py turns it into token ids."""

from megatron_opsd.config.section import NonNegative, Section

_CLOSING = r"Please reason step by step, and put your final answer within \boxed{}."

STUDENT_TEMPLATE = "Problem: {problem}\n\n" + _CLOSING

TEACHER_TEMPLATE = (
    "Problem: {problem}\n\n"
    "The following solution is known to be correct.\n\n"
    "--- begin solution ---\n"
    "{solution}\n"
    "--- end solution ---\n\n"
    "Make sure you understand every step of it. Then derive the answer yourself, in your own words, as if you had "
    "not been shown the solution.\n\n" + _CLOSING
)

ANSWER_TEMPLATE = (
    "Problem: {problem}\n\n"
    "The final answer is known to be {answer}. Derive it yourself, in your own words, as if you had not been told.\n\n"
    + _CLOSING
)


class PromptsConfig(Section):
    student_template: str = STUDENT_TEMPLATE
    """The student's user turn; {problem} is replaced."""
    teacher_template: str = TEACHER_TEMPLATE
    """The teacher's user turn; {problem} and {solution} are replaced."""
    answer_template: str = ANSWER_TEMPLATE
    """The teacher's user turn with method.context = `answer`; {problem} and {answer} are replaced."""
    student_thinking: bool = False
    """`enable_thinking` of the student's chat template."""
    teacher_thinking: bool = True
    """`enable_thinking` of the teacher's chat template."""
    teacher_prefix: str | None = None
    """Text between the teacher's prompt and the response, such as `<think>\\n` or an empty think block. Default: what
    lets the response begin on the teacher's side as on the student's."""
    skip_first_tokens: NonNegative = 0
    """Response tokens at the start that are not trained on."""
    train_on_end_of_turn: bool | None = None
    """Whether the token that ends a response is trained on. Default: not where the teacher's prefix has opened a think
    block, whose end it would expect there."""
