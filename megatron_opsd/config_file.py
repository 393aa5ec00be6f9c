"""A configuration from a TOML file with dotted overrides, and back. No torch here, so that mistakes show at once."""

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_opsd.config import Config, MethodConfig, Section
from megatron_opsd.errors import UserError
from megatron_opsd.files import parse_toml, read_text


def fields(schema: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> pydantic field of every setting below ``schema``."""
    found: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        sections = _sections_of(field.annotation)
        if not sections:
            found[prefix + name] = field
        for section in sections:
            found |= fields(section, f"{prefix}{name}.") | found  # of a union's sections, the first is the default
    return found


def _sections_of(annotation: Any) -> list[type[Section]]:
    """The section that a field holds; several of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections_of(part)]


def add_overrides(parser: argparse.ArgumentParser, only: str | None = None) -> None:
    """Give ``parser`` one ``--section.key`` option for every field, with the field's docstring as its help.

    only: a section; None for all.
    """
    groups = {}
    for name, field in fields().items():
        section = name.partition(".")[0]
        if only not in (None, section):
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(f"[{section}]")
        default = "required" if field.is_required() else json.dumps(field.default)
        text = f"{field.description} ({default if len(default) < 60 else 'default: see the docs'})"
        groups[section].add_argument(
            f"--{name}", metavar="VALUE", help=text.replace("%", "%%"), default=argparse.SUPPRESS
        )


# What other programs call a setting.
_ALIASES = {
    "batch_size": "train.global_batch_size",
    "bf16": "model.dtype",
    "completion_length": "rollout.max_response_tokens",
    "context_parallel_size": "parallel.tensor_model_parallel_size",
    "dataset": "data.path",
    "ep": "parallel.expert_model_parallel_size",
    "epochs": "train.steps",
    "eval_steps": "evaluate.interval",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_checkpointing": "model.recompute",
    "learning_rate": "optim.lr",
    "loss": "objective.kind",
    "max_completion_length": "rollout.max_response_tokens",
    "max_grad_norm": "optim.clip_grad",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_prompt_length": "data.max_problem_tokens",
    "max_steps": "train.steps",
    "max_tokens": "rollout.max_response_tokens",
    "model_name_or_path": "model.path",
    "n": "rollout.samples_per_prompt",
    "num_epochs": "train.steps",
    "num_generations": "rollout.samples_per_prompt",
    "num_train_epochs": "train.steps",
    "output_dir": "logging.run_dir",
    "per_device_train_batch_size": "train.micro_batch_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "precision": "model.dtype",
    "resume_from_checkpoint": "checkpoint.resume",
    "save_steps": "checkpoint.save_interval",
    "save_total_limit": "checkpoint.keep_last",
    "tp": "parallel.tensor_model_parallel_size",
    "warmup": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    "wd": "optim.weight_decay",
}


def nearest_name(name: str, spelled: Iterable[str], settings: Iterable[str]) -> str:
    """What a person most likely means: by meaning, by the last part of the name, and at last by spelling.

    spelled: names that only spelling leads to. settings: names of settings.
    """
    settings = list(settings)
    last = name.rpartition(".")[2].replace("-", "_").lower()
    if settings and last in _ALIASES:
        return _ALIASES[last]
    of_sections = [setting for setting in settings if setting.rpartition(".")[2] == last]
    if len(of_sections) == 1:
        return of_sections[0]
    return difflib.get_close_matches(name, [*spelled, *settings], n=1, cutoff=0)[0]


def load_config(path: str, overrides: dict[str, str]) -> Config:
    """Read a TOML file, lay dotted ``overrides`` over it and validate the result.

    Raises:
        UserError: unreadable file, unknown key (with the nearest valid one), wrong type or range.
    """
    raw = parse_toml(read_text(Path(path), "name the configuration of a run"), path)
    for name, text in overrides.items():
        _set(raw, name, text, path)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, path, overrides)) from error


def _set(raw: dict[str, Any], name: str, text: str, path: str) -> None:
    *sections, key = name.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise UserError(f"{path}: {section} = {raw!r}: must be a section, [{section}]")
    try:
        raw[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"[-+]?(\.\d+|\d+\.)(e[-+]?\d+)?", text, re.IGNORECASE):  # .5 and 1. are no numbers of TOML
            raw[key] = float(text)
            return
        field = fields().get(name)
        is_none = text.lower() == "none" and field is not None and field.default is None
        raw[key] = None if is_none else text  # an unquoted string


def _explain(error: ValidationError, path: str, overrides: dict[str, str]) -> str:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    if parts[:1] == ["method"]:
        del parts[1:2]  # pydantic's tag of the union
    name = ".".join(parts)
    where = f"--{name}" if name in overrides else f"{path}: {name}"
    methods = {section.model_fields["kind"].default: section for section in _sections_of(MethodConfig)}
    if first["type"] == "union_tag_invalid":
        return f"{path}: method.kind = {first.get('ctx', {})['tag']!r}: must be one of {', '.join(methods)}"
    if first["type"] in ("union_tag_not_found", "model_type", "dict_type") and parts == ["method"]:
        return f"{path}: method = {first['input']!r}: must be a section, [method] with a kind"
    if first["type"] == "extra_forbidden" and name in fields():
        owner = next(kind for kind, section in methods.items() if parts[-1] in section.model_fields)
        return (
            f"{where}: the method {first['loc'][1]!r} has no such setting, {owner!r} has; remove it, or set "
            f"method.kind = {owner!r}"
        )
    if first["type"] == "extra_forbidden":
        sections = {key.rpartition(".")[0] for key in fields()} - {""}
        return f"{where}: unknown key; the nearest valid one is {nearest_name(name, [*fields(), *sections], fields())}"
    if first["type"] == "missing":
        setting = next(field for field in fields() if f"{field}.".startswith(f"{name}."))
        return f"{path}: {setting}: missing; set it in the file or with --{setting}"
    if first["type"] == "value_error":  # a validator's, which names the settings itself
        return f"{path}: {first.get('ctx', {})['error']}"
    return f"{where} = {first['input']!r}: {first['msg']}"


def with_absolute_paths(config: Config) -> Config:
    """The configuration with the paths of what is on this machine from its root, for readers in other folders."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path  # else it is a dataset's id on the hub

    raw = config.model_dump()
    for section in filter(None, (raw["model"], raw["data"], raw["evaluate"]["data"])):
        section["path"] = absolute(section["path"])
    raw["logging"]["run_dir"] = absolute(raw["logging"]["run_dir"])
    return Config.model_validate(raw)


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML that :func:`load_config` reads back to the same values.

    TOML has no null: a field that is None is left out, so None may only ever be a field's default.
    """
    lines: list[str] = []

    def write(section: dict[str, Any], prefix: str) -> None:
        lines.append(f"[{prefix}]")
        lines.extend(
            f"{key} = {json.dumps(value, ensure_ascii=False)}"
            for key, value in section.items()
            if value is not None and not isinstance(value, dict)
        )
        lines.append("")
        for key, value in section.items():
            if isinstance(value, dict):
                write(value, f"{prefix}.{key}")

    for name, section in config.model_dump().items():
        write(section, name)
    return "\n".join(lines)
