"""What a run's inputs hold, looked at before the start: weights' headers, the tokenizer, prompts as rendered, rows."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from megatron_opsd.config import Config
from megatron_opsd.data.datasets import check_data, check_grades, drop_long
from megatron_opsd.data.prompts import PromptBuilder
from megatron_opsd.errors import UserError
from megatron_opsd.files import read_json
from megatron_opsd.types import Example
from megatron_opsd.weights.architecture import Architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.mapping import NameTable

_TOKENIZED_ROWS = 1000  # of the shortest ones, to see whether any is short enough
_ANSWER = "An answer."  # what is rendered to see how the chat template ends a turn


def check_weights(path: str, arch: Architecture) -> None:
    """Check the headers of all weight files, and that a tied model has no other head.

    Raises:
        UserError: names the file or tensor.
    """
    reader = HFReader(path)
    reader.check(NameTable(arch).hf_tensors())
    reader.check_tied_head(arch)


def check_tokenizer(prompts: PromptBuilder, arch: Architecture, path: str) -> None:
    """Check that the embedding has a row for every token."""
    token, last = max(prompts.tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= arch.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has the token {token!r} with id {last}, for which config.json's vocab_size = "
            f"{arch.vocab_size} has no row; use the tokenizer of this checkpoint, or give the embedding more rows"
        )


def check_rows(config: Config, prompts: PromptBuilder, train: bool) -> list[str]:
    """Check the first rows of the data, and the first and the longest one as rendered prompts. Returns warnings.

    train: False for an evaluation, which reads no training data.
    """
    warnings: list[str] = []
    train_on: list[Example] = []
    if train:
        train_on, all_of_it = check_data(config.data, "data", config.reads)
        _check_prompts(config, prompts, train_on)
        warnings += _check_control_tokens(config, prompts, train_on)
        if all_of_it:
            _check_limits(config, prompts, train_on)
            if config.method.writes_rollouts:
                check_grades(train_on, config)
        curriculum, drawn = config.train.curriculum, config.problems_per_step
        there = math.ceil(len(train_on) * (curriculum.window if curriculum else 1))
        if all_of_it and there < drawn:
            where = f"train.curriculum.window = {curriculum.window:g} of " if curriculum else ""
            warnings.append(
                f"a step draws {drawn} problems (train.global_batch_size / rollout.samples_per_prompt), and "
                f"{where}{config.data.path} has {there}: a step sees some of them several times"
            )
    if config.evaluate.data:
        held_out = check_data(config.evaluate.data, "evaluate.data", "answer")[0][: config.evaluate.limit]
        _check_prompts(config, prompts, held_out, teacher=False)
        known = {example.problem for example in train_on}
        both = sum(example.problem in known for example in held_out)
        if both:
            warnings.append(
                f"{both} of {len(held_out)} problems of evaluate.data.path = {config.evaluate.data.path!r} are in the "
                "training data too: their accuracy says nothing about new problems"
            )
    return warnings


def _check_prompts(config: Config, prompts: PromptBuilder, examples: Sequence[Example], teacher: bool = True) -> None:
    """Render what the run will render; PromptBuilder refuses prompts that do not contain what they must."""
    longest = max(examples, key=lambda example: len(example.problem) + len(example.solution))
    for example in (examples[0], longest):
        prompts.student(example)
        if not teacher:
            continue
        if config.reads == "solution":
            prompts.teacher(example)
            if not config.method.writes_rollouts:
                prompts.solution(example)
        if config.method.teacher_sees == "answer" and example.answer is not None:
            prompts.teacher_with_answer(example)


def _check_control_tokens(config: Config, prompts: PromptBuilder, examples: Sequence[Example]) -> list[str]:
    """Warn where a row's text would be read as the end of a turn, or as another token of the chat template."""
    control = {str(token) for token in prompts.tokenizer.added_tokens_decoder.values() if token.special}
    pattern = re.compile("|".join(map(re.escape, sorted(control))) or r"(?!)")
    found = [match[0] for example in examples if (match := pattern.search(example.problem + example.solution))]
    if not found:
        return []
    return [
        f"{config.data.path}: {len(found)} of the first {len(examples)} rows hold text such as {found[0]}, which the "
        "tokenizer reads as a control token; take it out"
    ]


def _check_limits(config: Config, prompts: PromptBuilder, examples: Sequence[Example]) -> None:
    """Refuse limits that leave none of the rows."""
    solutions = config.data.max_solution_tokens if config.reads == "solution" else None
    shortest = sorted(examples, key=lambda example: len(example.problem) + len(example.solution))[:_TOKENIZED_ROWS]
    drop_long(shortest, prompts.tokenizer, config.data.max_problem_tokens, solutions)


def check_turns(prompts: PromptBuilder, arch: Architecture, path: str) -> list[str]:
    """Warn where responses may not end with their turn, or not begin as the assistant's."""
    question = [{"role": "user", "content": "A question?"}]
    own = prompts.tokenizer.eos_token_id
    ends = _eos_ids(Path(path), arch.vocab_size) | ({own} if isinstance(own, int) else set())
    asked = prompts.render_chat(question, prompts.student_thinking)
    warnings = []
    if asked == prompts.render_chat(question, prompts.student_thinking, add_generation_prompt=False):
        warnings.append(f"{path}: the chat template begins no turn of the assistant (add_generation_prompt)")
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        answered = prompts.render_chat([*question, answer], prompts.student_thinking, add_generation_prompt=False)
    except UserError:  # a template for prompts alone
        return warnings
    if _ANSWER not in answered:
        return warnings
    ending = prompts.tokenizer.encode(answered.rpartition(_ANSWER)[2].lstrip(), add_special_tokens=False)[:1]
    if ending and ending[0] in prompts.tokenizer.added_tokens_decoder and ending[0] not in ends:
        token = prompts.tokenizer.convert_ids_to_tokens(ending[0])
        warnings.append(
            f"{path}: the chat template ends a turn with {token} (id {ending[0]}), which does not end a response (ids "
            f"{sorted(ends)}): responses go on behind their turn; add it to eos_token_id in generation_config.json"
        )
    return warnings


def check_openings(prompts: PromptBuilder) -> list[str]:
    """Warn where a response begins in one state on the student's side and in another on the teacher's."""
    student, teacher = prompts.openings
    if student == teacher:
        return []
    thinks = [str(switch).lower() for switch in (prompts.student_thinking, prompts.teacher_thinking)]
    return [
        f"prompts.student_thinking = {thinks[0]}, prompts.teacher_thinking = {thinks[1]}: a response stands behind "
        f"{student!r} for the student and behind {teacher!r} for the teacher, which can do harm (docs/paper.md); turn "
        "thinking on or off for both, without teacher_prefix"
    ]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


class _GenerationConfig(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    eos_token_id: Annotated[list[int], BeforeValidator(_as_list)] = []


def _eos_ids(model: Path, vocab_size: int) -> set[int]:
    """The ids at which vLLM ends a response, beside the tokenizer's own."""
    file = model / "generation_config.json"
    file = file if file.exists() else model / "config.json"
    remedy = "correct it, or copy it from the original checkpoint"
    ids = read_json(file, _GenerationConfig, remedy).eos_token_id
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"{file}: eos_token_id = {token}: the vocabulary has {vocab_size} ids; {remedy}")
    return set(ids)
