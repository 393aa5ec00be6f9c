"""Prompts under the tokenizer and the chat template of Qwen3, and under those of the arithmetic example."""

import copy
import importlib.util
import itertools
from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from megatron_opsd.config import Config, DataConfig, ModelConfig, PromptsConfig
from megatron_opsd.data.prompts import STUDENT_TEMPLATE, TEACHER_TEMPLATE, PromptBuilder, build_prompts, fill
from megatron_opsd.errors import UserError
from megatron_opsd.types import Example

BASE = Path(__file__).parents[2] / "examples" / "arithmetic" / "base"
EXAMPLE = Example(0, r"Find \frac{1}{2} of {x}.", r"It is {solution} \boxed{\frac{x}{2}}, says {problem}.", "x/2")
HEADER = "<|im_start|>assistant\n"
NO_THOUGHTS = "<think>\n\n</think>\n\n"


def installed(package: str, *path: str) -> Path:
    """A file of a package, without importing it: these pull in much that is not needed here."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*path)


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer: Qwen's merges, the added tokens of Qwen3 in their order, its chat template."""
    merges = str(installed("dashscope", "resources", "qwen.tiktoken"))
    vocab, pairs = TikTokenConverter(merges).extract_vocab_merges_from_model(merges)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=pairs)
    controls = ["im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start"]
    controls += ["quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in controls]})
    words = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
    words += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = installed("trl", "chat_templates", "qwen3.jinja").read_text()
    return tokenizer


def test_it_is_the_published_tokenizer(qwen3: PreTrainedTokenizerBase) -> None:
    """Ids that the published files have."""
    known = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<think>": 151667}
    assert {token: qwen3.convert_tokens_to_ids(token) for token in known} == known
    assert len(qwen3) == 151669
    assert qwen3.encode("<think>\n\n</think>\n\n") == [151667, 271, 151668, 271]
    assert qwen3.encode("Problem: Find 1234.") == [31198, 25, 7379, 220, 16, 17, 18, 19, 13]


@pytest.fixture(params=["qwen3", "arithmetic"])
def tokenizer(request: pytest.FixtureRequest, qwen3: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return copy.copy(qwen3) if request.param == "qwen3" else AutoTokenizer.from_pretrained(BASE)


PAIRINGS = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize(("student_thinking", "teacher_thinking"), PAIRINGS, ids=str)
def test_every_pairing_of_thinking_predicts_the_same_response(
    tokenizer: PreTrainedTokenizerBase, student_thinking: bool, teacher_thinking: bool
) -> None:
    builder = PromptBuilder(tokenizer, student_thinking=student_thinking, teacher_thinking=teacher_thinking)
    response = [*tokenizer.encode(r"Half of it is \boxed{x/2}."), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    predicted = []
    for prompt in (builder.student(EXAMPLE), builder.teacher(EXAMPLE)):
        sequence = prompt + response
        # The logits at position i predict token i + 1.
        predicted.append([sequence[i + 1] for i in range(len(prompt) - 1, len(sequence) - 1)])
    assert predicted[0] == predicted[1] == response


@pytest.mark.parametrize(("student_thinking", "teacher_thinking"), PAIRINGS, ids=str)
def test_a_response_begins_alike_on_both_sides(
    tokenizer: PreTrainedTokenizerBase, student_thinking: bool, teacher_thinking: bool
) -> None:
    """By default what stands before the first token that is trained on ends with the same think tokens."""
    builder = PromptBuilder(tokenizer, student_thinking=student_thinking, teacher_thinking=teacher_thinking)
    first = tokenizer.encode(
        ("<think>\n" if student_thinking else "") + "First, find a half.", add_special_tokens=False
    )
    student, teacher = (
        tokenizer.decode(prompt + first[: builder.untrained_at_start]).rpartition(HEADER)[2]
        for prompt in (builder.student(EXAMPLE), builder.teacher(EXAMPLE))
    )
    expected = {
        (False, False): (NO_THOUGHTS, NO_THOUGHTS),
        (True, True): ("", ""),
        (False, True): (NO_THOUGHTS, NO_THOUGHTS),  # the prefix closes the teacher's think block
        (True, False): ("<think>\n", NO_THOUGHTS + "<think>\n"),  # no prefix can open a closed block again
    }
    assert (student, teacher) == expected[student_thinking, teacher_thinking]
    assert builder.trains_on_end_of_turn
    assert tokenizer.decode(builder.with_solution(EXAMPLE)).endswith(HEADER + ("" if student_thinking else NO_THOUGHTS))


def test_the_end_of_turn_is_not_trained_on_where_the_teacher_alone_is_inside_of_a_think_block(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """It would expect the end of its thoughts where the student ends its turn."""
    assert not PromptBuilder(tokenizer, teacher_prefix="<think>\n").trains_on_end_of_turn
    assert PromptBuilder(tokenizer, teacher_prefix="<think>\n", train_on_end_of_turn=True).trains_on_end_of_turn
    assert PromptBuilder(tokenizer, teacher_prefix=NO_THOUGHTS).trains_on_end_of_turn
    assert PromptBuilder(tokenizer, teacher_prefix="").trains_on_end_of_turn
    # A template for models that always think opens the block itself, for both.
    tokenizer.chat_template += "{%- if add_generation_prompt -%}{{- '<think>\n' -}}{%- endif -%}"
    assert PromptBuilder(tokenizer, student_thinking=True).trains_on_end_of_turn


def test_skipped_tokens_are_those_of_the_setting_or_of_the_pairing(tokenizer: PreTrainedTokenizerBase) -> None:
    opening = len(tokenizer.encode("<think>\n", add_special_tokens=False))
    for thinking, skip, untrained in (((False, True), 3, 3), ((True, False), 0, opening), ((True, False), 9, 9)):
        student, teacher = thinking
        builder = PromptBuilder(tokenizer, student_thinking=student, teacher_thinking=teacher, skip_first_tokens=skip)
        assert builder.untrained_at_start == untrained
    builder = PromptBuilder(tokenizer, student_thinking=True, teacher_thinking=False, teacher_prefix="")
    assert builder.untrained_at_start == 0  # who gives a prefix knows what it does


def test_a_template_without_thinking_needs_no_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}\n{% endif %}"
    for student, teacher in PAIRINGS:
        builder = PromptBuilder(tokenizer, student_thinking=student, teacher_thinking=teacher)
        assert (builder.prefix, builder.untrained_at_start, builder.trains_on_end_of_turn) == ("", 0, True)


def test_rendered_prompts_are_one_user_turn_with_the_texts_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    builder = PromptBuilder(tokenizer)
    student, teacher = tokenizer.decode(builder.student(EXAMPLE)), tokenizer.decode(builder.teacher(EXAMPLE))
    assert student == (
        f"<|im_start|>user\nProblem: {EXAMPLE.problem}\n\nPlease reason step by step, and put your final answer "
        f"within \\boxed{{}}.<|im_end|>\n{HEADER}{NO_THOUGHTS}"
    )
    assert teacher.startswith(f"<|im_start|>user\nProblem: {EXAMPLE.problem}\n\n")
    assert EXAMPLE.solution in teacher
    assert EXAMPLE.solution not in student
    assert teacher.endswith(f"put your final answer within \\boxed{{}}.<|im_end|>\n{HEADER}{NO_THOUGHTS}")
    assert teacher.count("<|im_start|>") == 2


@pytest.mark.parametrize("prefix", ["<think>\n", NO_THOUGHTS, "Sol"])
def test_teacher_prefix_is_appended_and_never_merges_with_the_response(
    tokenizer: PreTrainedTokenizerBase, prefix: str
) -> None:
    plain, prefixed = PromptBuilder(tokenizer, teacher_prefix=""), PromptBuilder(tokenizer, teacher_prefix=prefix)
    prefix_ids = tokenizer.encode(prefix, add_special_tokens=False)
    assert prefixed.teacher(EXAMPLE) == plain.teacher(EXAMPLE) + prefix_ids
    assert prefixed.student(EXAMPLE) == plain.student(EXAMPLE)


def test_a_response_as_a_solution_has_no_thoughts(qwen3: PreTrainedTokenizerBase) -> None:
    for text, shown in (
        (" It is 2.<|im_end|>", "It is 2."),
        ("<think>\nOne and one?\n</think>\n\nIt is 2.<|im_end|>", "It is 2."),
        ("<think>\nIt is 2.\n</think>\n\n<|im_end|>", "<think>\nIt is 2.\n</think>"),
    ):
        assert PromptBuilder(qwen3).read_response(qwen3.encode(text)) == shown


def test_fill_replaces_placeholders_once_and_leaves_other_braces() -> None:
    filled = fill(r"{problem} {x} \boxed{} {{problem}} {solution}", {"problem": "{solution}", "solution": "{problem}"})
    assert filled == r"{solution} {x} \boxed{} {{solution}} {problem}"


@pytest.mark.parametrize(
    ("field", "template", "message"),
    [
        ("student_template", "Solve it.", "prompts.student_template has no {problem}"),
        ("student_template", "{problem} {solution}", "prompts.student_template contains {solution}"),
        ("teacher_template", "{problem}", "prompts.teacher_template has no {solution}"),
        ("teacher_template", "{solution}", "prompts.teacher_template has no {problem}"),
    ],
)
def test_bad_templates_are_refused(tokenizer: PreTrainedTokenizerBase, field: str, template: str, message: str) -> None:
    templates = {"student_template": STUDENT_TEMPLATE, "teacher_template": TEACHER_TEMPLATE, field: template}
    with pytest.raises(UserError) as caught:
        PromptBuilder(tokenizer, **templates)
    assert str(caught.value).startswith(message)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        PromptBuilder(tokenizer)


def test_build_prompts_takes_tokenizer_and_templates_from_the_configuration(tmp_path: Path) -> None:
    settings = PromptsConfig(student_template="Q: {problem}", student_thinking=True, teacher_prefix="<think>\n")
    data = DataConfig(path="unused.jsonl")
    builder = build_prompts(Config(model=ModelConfig(path=str(BASE)), data=data, prompts=settings))
    assert builder.tokenizer.decode(builder.student(EXAMPLE)) == (
        f"<|im_start|>user\nQ: {EXAMPLE.problem}<|im_end|>\n{HEADER}"
    )
    assert builder.tokenizer.decode(builder.teacher(EXAMPLE)).endswith(HEADER + "<think>\n")
    with pytest.raises(UserError, match=r"model\.path = '.*': its tokenizer cannot be loaded"):
        build_prompts(Config(model=ModelConfig(path=str(tmp_path)), data=data))


def test_a_teacher_may_see_the_answer_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptBuilder(tokenizer, answer_template="{problem} Known: {answer}.", teacher_thinking=False)
    example = Example(0, "1+1?", "Easy.", "2")
    text = tokenizer.decode(prompts.teacher_with_answer(example))
    assert "1+1? Known: 2." in text
    assert "Easy" not in text


def test_a_solution_is_a_response_with_the_end_of_its_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = PromptBuilder(tokenizer).solution(Example(0, "1+1?", "Easy: 2.", "2"))
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "Easy: 2."
