"""Tokenizers, chat templates, lengths, guards and sizes that do not fit together."""

import json

from . import ROW, Bad, Change, Inputs

TEMPLATE = "model/chat_template.jinja"


def template(what: str, text: str, *says: str) -> Bad:
    return Bad(what, ["{folder}/model", "chat template", *says], lambda i: i.write(TEMPLATE, text))


def settings(what: str, says: list[str], **values: str) -> Bad:
    return Bad(what, says, settings={name.replace("__", "."): value for name, value in values.items()})


def tokenizer_file(what: str, name: str, contents: str | bytes, *says: str) -> Bad:
    return Bad(what, [name, *says], lambda i: i.write(f"model/{name}", contents))


def more_tokens(inputs: Inputs) -> None:
    """150 tokens beyond the 512 rows of the embedding."""
    file = inputs.model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"] += [{"id": 512 + i, "content": f"<|extra{i}|>", **flags} for i in range(150)]
    file.write_text(json.dumps(tokenizer))


def without_template(inputs: Inputs) -> None:
    (inputs.model / "chat_template.jinja").unlink()


def named_templates(inputs: Inputs) -> None:
    without_template(inputs)
    inputs.change("model/tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "x"}])


def long_rows(column: str) -> Change:
    return lambda inputs: inputs.rows([ROW | {column: "1+" * 200}] * 4)


def weights(name: str, contents: bytes) -> Change:
    return lambda inputs: inputs.write(f"model/{name}", contents)


PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"

ROWS = [
    Bad("token ids beyond the embedding", ["<|extra149|>", "id 561", "vocab_size = 512", "more rows"], more_tokens),
    Bad("no chat template", ["{folder}/model", "no chat template", "chat_template.jinja"], without_template),
    Bad("only named templates", ["{folder}/model", "chat template", "chat_template.jinja"], named_templates),
    template("a template that raises", "{{ raise_exception('no such role') }}", "no such role"),
    template("a template cut off", "{% for m in messages %}", "fails", "chat_template.jinja"),
    template("a filter that is none", "{{ messages | nosuch }}", "nosuch"),
    template("a key that is none", "{{ messages[7].content }}", "fails"),
    template("text and a number added", "{{ messages[0].content + 1 }}", "fails"),
    template("a macro without end", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    template("a division by nothing", "{{ 1 / 0 }}", "division by zero"),
    template("a template for lists of parts", PARTS, "leaves out what the prompt says", "Problem: "),
    template("a template of fixed words", "user: assistant:", "leaves out what the prompt says"),
    template("a template that cuts", "{{ messages[0].content[:10] }}", "leaves out what the prompt says"),
    template("a template of empty lines", "\n\n", "leaves out"),
    tokenizer_file("a template in utf-16", "chat_template.jinja", "{{ 1 }}".encode("utf-16"), "UTF-16"),
    tokenizer_file("a tokenizer cut off", "tokenizer.json", '{"version": "1.0", ', "not valid JSON", "copy the"),
    tokenizer_file("an empty tokenizer", "tokenizer.json", "", "is empty"),
    tokenizer_file("a tokenizer that is a list", "tokenizer.json", "[]", "must be a JSON object", "list"),
    tokenizer_file("a pointer as a tokenizer", "tokenizer.json", "version https://git-lfs.github.com/spec/v1", "pull"),
    tokenizer_file("a broken tokenizer_config", "tokenizer_config.json", "{]", "not valid JSON", "copy the"),
    tokenizer_file("broken special tokens", "special_tokens_map.json", "{", "not valid JSON"),
    Bad(
        "a tokenizer of nothing",
        ["tokenizer cannot be loaded", "copy"],
        lambda i: i.write("model/tokenizer.json", "{}"),
    ),
    tokenizer_file("eos ids that are text", "generation_config.json", '{"eos_token_id": "2"}', "eos_token_id.0 = '2'"),
    Bad(
        "an end of text beyond the vocabulary",
        ["generation_config.json: eos_token_id = 99999", "512 ids"],
        lambda i: i.change("model/generation_config.json", eos_token_id=[2, 99999]),
    ),
    Bad(
        "a length that is text",
        ["tokenizer_config.json", "model_max_length", "copy the tokenizer"],
        lambda i: i.change("model/tokenizer_config.json", model_max_length="long"),
    ),
    Bad("half of the weights", ["model.safetensors"], weights("model.safetensors", bytes(100))),
    Bad("a pointer as weights", ["model.safetensors"], weights("model.safetensors", b"version https://git-lfs.github")),
    Bad("no weights", ["{folder}/model", "safetensors"], lambda i: (i.model / "model.safetensors").unlink()),
    Bad("problems that are too long", ["data.max_problem_tokens = 64", "none is left"], long_rows("problem")),
    Bad("solutions that are too long", ["data.max_solution_tokens = 128", "none is left"], long_rows("solution")),
    settings(
        "nothing is trained",
        ["prompts.skip_first_tokens = 64", "rollout.max_response_tokens = 64", "lower it"],
        prompts__skip_first_tokens="64",
    ),
    settings(
        "nothing of the solutions is trained",
        ["prompts.skip_first_tokens = 200", "data.max_solution_tokens = 128"],
        prompts__skip_first_tokens="200",
        method__kind="sft",
    ),
    settings("too hot for vLLM", ["rollout.temperature = 2.5", "less than or equal to 2"], rollout__temperature="2.5"),
    settings("too hot an evaluation", ["evaluate.temperature = 3.0", "equal to 2"], evaluate__temperature="3.0"),
    settings("cold", ["rollout.temperature = -1.0", "greater than or equal to 0"], rollout__temperature="-1.0"),
    settings("no nucleus", ["rollout.top_p = 0.0", "greater than 0"], rollout__top_p="0.0"),
    settings(
        "guards of the entropy that contradict each other",
        ["guards.min_entropy = 2 is not below guards.max_entropy = 1"],
        guards__min_entropy="2.0",
        guards__max_entropy="1.0",
    ),
    settings(
        "guards of the length that contradict each other",
        ["guards.min_response_length = 20 is not below guards.max_response_length = 20"],
        guards__min_response_length="20.0",
        guards__max_response_length="20.0",
    ),
    settings(
        "a guard that every step is beyond",
        ["guards.min_response_length = 100", "rollout.max_response_tokens = 64"],
        guards__min_response_length="100.0",
    ),
    settings(
        "more entropy than there is",
        ["guards.min_entropy = 100", "6.238", "lower it"],
        guards__min_entropy="100.0",
    ),
    settings("half a micro-batch", ["micro_batch_size = 3 does not divide"], train__micro_batch_size="3"),
    settings("no problem of its own", ["samples_per_prompt = 3 does not"], rollout__samples_per_prompt="3"),
    Bad("no ranks", ["--world-size = 0", "at least 1"], command=("check", "--world-size", "0")),
    Bad("ranks below nothing", ["--world-size = -2", "at least 1"], command=("check", "--world-size", "-2")),
    Bad("ranks that are no number", ["--world-size", "'two'", "--help"], command=("check", "--world-size", "two")),
]


def end_of_turn(inputs: Inputs) -> None:
    """As in base checkpoints: responses end with <|endoftext|>, the chat template's turns with <|im_end|>."""
    inputs.change("model/tokenizer_config.json", eos_token="<|endoftext|>")
    inputs.change("model/generation_config.json", eos_token_id=0)
    inputs.config(eos_token_id=0)


WARNINGS = [
    Bad(
        "a turn's end that ends no response",
        ["{folder}/model", "<|im_end|> (id 2)", "(ids [0])", "eos_token_id in generation_config.json"],
        end_of_turn,
    ),
    Bad(
        "a template without the assistant's turn",
        ["{folder}/model", "begins no turn of the assistant"],
        lambda i: i.write(TEMPLATE, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ),
    Bad(
        "a problem with the end of a turn in it",
        ["train.jsonl: 1 of the first 4 rows", "<|im_end|>", "control token"],
        lambda i: i.rows([ROW, ROW, ROW, ROW | {"problem": "1+1?<|im_end|>"}]),
    ),
    Bad(
        "a warm-up that does not end",
        ["optim.warmup_steps = 2", "train.steps = 2"],
        settings={"optim.warmup_steps": "2"},
    ),
    Bad(
        "a student that thinks and a teacher that does not",
        ["student_thinking = true", "teacher_thinking = false", "<think>\\n\\n</think>", "on or off for both"],
        settings={"prompts.student_thinking": "true"},
    ),
    Bad(
        "a teacher inside of a think block",
        ["student_thinking = false", "teacher_thinking = true", "<|im_start|>assistant\\n<think>\\n'", "can do harm"],
        settings={"prompts.teacher_thinking": "true", "prompts.teacher_prefix": '"<think>\\n"'},
    ),
    Bad("fewer problems than a step draws", ["draws 4 problems", "has 2"], lambda i: i.rows([ROW] * 2)),
    Bad(
        "evaluation on training data",
        ["2 of 3 problems of evaluate.data.path", "are in the training data"],
        lambda i: i.rows([ROW, ROW | {"problem": "Compute 2+2."}, ROW], "test.jsonl"),
    ),
]
