"""The command line: ``opsd``, or ``python -m megatron_opsd`` under torchrun."""

import argparse
import difflib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opsd.config import Config, add_overrides, fields, load_config
from megatron_opsd.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A :class:`UserError` becomes one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="opsd", description="On-Policy Self-Distillation of Qwen3.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help_text, _) in COMMANDS.items():
        usage = f"opsd {name} FILE.toml [--section.key VALUE ...]"  # argparse would list every setting
        command = commands.add_parser(name, help=help_text, description=help_text, usage=usage, allow_abbrev=False)
        command.add_argument("config", metavar="FILE.toml", help="the run's configuration")
        if name == "check":
            command.add_argument("--world-size", type=int, help="ranks of the run, where known")
        if name == "evaluate":
            command.add_argument("--out", type=Path, help="write the responses to this JSONL")
        add_overrides(command)
    parsed, unknown = parser.parse_known_args(arguments)
    options = vars(parsed)
    overrides = {name: options.pop(name) for name in fields() if name in options}
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch")  # at import: what a machine does not have
    try:
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], [f"--{name}" for name in fields()], n=1, cutoff=0)[0]
            raise UserError(f"{unknown[0]}: unknown option; the nearest valid one is {nearest}")
        config = load_config(options["config"], overrides)
        COMMANDS[options["command"]][1](config, argparse.Namespace(**options))
    except UserError as error:
        if not _is_local_rank_0():
            time.sleep(3)  # where rank 0 fails alike, torchrun ends this process before it repeats the line
        print(f"opsd: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _is_local_rank_0() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _preflight(config: Config, train: bool) -> None:
    """One process of each machine looks; the others find out when they wait for it in vain."""
    if _is_local_rank_0():
        from megatron_opsd.preflight import check

        check(config, int(os.environ.get("WORLD_SIZE", "1")), train)


def _train(config: Config, _: argparse.Namespace) -> None:
    _preflight(config, train=True)
    from megatron_opsd.trainer import train

    train(config)


def _check(config: Config, options: argparse.Namespace) -> None:
    from megatron_opsd.preflight import check

    check(config, options.world_size)
    print(f"{options.config}: no mistakes found")


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    if config.evaluate.data is None:
        raise UserError("evaluate.data.path is missing; set it in the file or with --evaluate.data.path")
    _preflight(config, train=False)
    from megatron_opsd.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config, options.out)


COMMANDS = {
    "train": ("Train a model. Run under torchrun, one process a GPU.", _train),
    "check": ("Find mistakes in a configuration without starting anything.", _check),
    "evaluate": ("Greedy accuracy and Avg@k of a Hugging Face directory (model.path) on evaluate.data.", _evaluate),
}
