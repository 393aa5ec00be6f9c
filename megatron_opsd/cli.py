"""The command line: ``opsd``, or ``python -m megatron_opsd`` under torchrun."""

import argparse
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from megatron_opsd.config import Config
from megatron_opsd.config_file import add_overrides, fields, load_config, nearest_name
from megatron_opsd.errors import UserError
from megatron_opsd.files import check_writable
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.torchrun import leave_for_report, start_ranks

MOST_GPUS = 65536  # of a plan: a larger one would take minutes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A :class:`UserError` becomes one line on stderr and exit status 2."""
    try:
        _run(arguments)
    except UserError as error:
        leave_for_report(error)
        if not _is_local_rank_0():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(15)  # where rank 0 fails alike, torchrun ends this process before it repeats the line
        print(f"opsd: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:  # a run that has begun listens for signals itself
        sys.exit(128 + signal.SIGINT)


class _Help(argparse.Action):
    """``--help`` shows everything, ``--help optim`` the settings of [optim]."""

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, section: Any, option: str | None = None
    ) -> None:
        if section is not None:
            if section not in Config.model_fields:
                raise UserError(f"--help {section}: no such section; choose one of {', '.join(Config.model_fields)}")
            parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
            add_overrides(parser, section)
        parser.print_help()
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _run(arguments: Sequence[str] | None) -> None:
    parsed, unknown = _build_parser().parse_known_args(arguments)
    options = vars(parsed)
    command, overrides = options.pop("command"), {name: options.pop(name) for name in fields() if name in options}
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch")  # at import: what a machine does not have
    if unknown:
        if not unknown[0].startswith("--"):
            raise UserError(f"{unknown[0]}: not expected here; settings are given as --section.key value")
        own = [name.replace("_", "-") for name in options if name not in ("config", "direction")]
        nearest = nearest_name(unknown[0].removeprefix("--"), own, [] if command == "convert" else list(fields()))
        raise UserError(f"{unknown[0]}: unknown option; the nearest valid one is --{nearest}")
    if command == "convert":
        _convert(argparse.Namespace(**options))
        return
    config = load_config(options["config"], overrides)
    COMMANDS[command][1](config, argparse.Namespace(**options, overrides=overrides))


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="opsd", description="On-Policy Self-Distillation of Qwen3.")
    parser.add_argument("--version", action="version", version=f"opsd {version('megatron-opsd')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help_text, _, add_options) in COMMANDS.items():
        usage = f"opsd {name} FILE.toml [--section.key VALUE ...]"  # argparse would list every setting
        command = commands.add_parser(
            name, help=help_text, description=help_text, usage=usage, allow_abbrev=False, add_help=False
        )
        command.add_argument(
            "-h", "--help", action=_Help, nargs="?", metavar="SECTION", help="show this, or the settings of a section"
        )
        command.add_argument("config", metavar="FILE.toml", help="the run's configuration")
        add_options(command)
        add_overrides(command)
    _add_convert(commands.add_parser("convert", help=CONVERT, description=CONVERT, allow_abbrev=False))
    return parser


def flags(overrides: Mapping[str, str]) -> list[str]:
    """Settings as arguments of the command line: ``--section.key value``."""
    return [part for name, value in overrides.items() for part in (f"--{name}", value)]


def _is_local_rank_0() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _preflight(config: Config, train: bool) -> None:
    """One process of each machine looks; the others find out when they wait for it in vain."""
    from megatron_opsd.plan.preflight import check, check_devices, check_processes, check_transformer_engine

    check_processes(os.environ)
    check_devices(os.environ)
    if _is_local_rank_0():
        warnings = check(config, int(os.environ.get("WORLD_SIZE", "1")), train, starts_here=True)
        if os.environ.get("RANK", "0") == "0":
            _print_warnings(warnings)
    elif train:
        check_transformer_engine()  # Megatron is about to import it, with a traceback where it is broken


def _train(config: Config, options: argparse.Namespace) -> None:
    if options.nproc is not None:
        sys.exit(_start_ranks("train", options))
    try:
        _preflight(config, train=True)
        from megatron_opsd.run import train

        train(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            RunDir(config.logging.run_dir).write_mistake(str(error))
        raise


def _start_ranks(command: str, options: argparse.Namespace) -> int:
    """Run this command on so many ranks of this machine. Returns its exit status."""
    if options.nproc < 1:
        raise UserError(f"--nproc = {options.nproc}: must be at least 1")
    if "RANK" in os.environ:
        raise UserError(f"--nproc = {options.nproc}: torchrun has started ranks already; leave one of them out")
    own = ["--out", str(options.out)] if getattr(options, "out", None) else []
    return start_ranks(options.nproc, [command, options.config, *own, *flags(options.overrides)])


def _add_nproc(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nproc", type=int, help="start so many ranks on this machine, instead of torchrun")


def _add_check_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--world-size", type=int, help="ranks of the run, where known")


def _check(config: Config, options: argparse.Namespace) -> None:
    from megatron_opsd.plan.preflight import check

    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size = {options.world_size}: must be at least 1")
    _print_warnings(check(config, options.world_size))
    print(f"{options.config}: no mistakes found")


def _print_warnings(warnings: Sequence[str]) -> None:
    for text in warnings:
        print(f"warning: {text}", flush=True)


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.usage = (
        "opsd plan FILE.toml --nodes N --gpus-per-node N --gpu-memory-gib GIB [--json] [--section.key VALUE ...]"
    )
    command.add_argument("--nodes", type=int, required=True, help="machines")
    command.add_argument("--gpus-per-node", type=int, required=True, help="GPUs of each machine")
    command.add_argument("--gpu-memory-gib", type=float, required=True, help="memory of each GPU")
    command.add_argument("--json", action="store_true", help="print JSON, memory in bytes")


def _plan(config: Config, options: argparse.Namespace) -> None:
    """Exit status 1 where the run does not fit."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: what is planned is not this machine
    from megatron_opsd.plan.planner import Cluster
    from megatron_opsd.plan.report import run_plan

    for name in ("nodes", "gpus_per_node", "gpu_memory_gib"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')} = {getattr(options, name)}: must be greater than 0, and finite"
            )
    if options.nodes * options.gpus_per_node > MOST_GPUS:
        size = f"--nodes {options.nodes} x --gpus-per-node {options.gpus_per_node}"
        raise UserError(f"{size}: plans end at {MOST_GPUS} GPUs; name fewer")
    cluster = Cluster(options.nodes, options.gpus_per_node, options.gpu_memory_gib)
    if not run_plan(options.config, config, cluster, options.json):
        sys.exit(1)


def _add_evaluate_options(command: argparse.ArgumentParser) -> None:
    _add_nproc(command)
    command.add_argument("--out", type=Path, help="write the responses to this JSONL")


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    if options.nproc is not None:
        sys.exit(_start_ranks("evaluate", options))
    if config.evaluate.data is None:
        raise UserError("evaluate.data.path is missing; set it in the file or with --evaluate.data.path")
    if options.out:
        check_writable(options.out, "--out")
    _preflight(config, train=False)
    from megatron_opsd.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config, options.out)


def _add_serve_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--host", default="127.0.0.1", help="where to listen (127.0.0.1); elsewhere needs OPSD_API_KEY"
    )
    command.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")


def _serve(config: Config, options: argparse.Namespace) -> None:
    from megatron_opsd.data.prompts import build_prompts, max_model_len
    from megatron_opsd.plan.preflight import check_server
    from megatron_opsd.rollout.serve import serve

    check_server(config)
    serve(config, max_model_len(config, build_prompts(config)), options.host, options.port)


def _add_convert(command: argparse.ArgumentParser) -> None:
    directions = command.add_subparsers(dest="direction", required=True)
    for direction in ("hf-to-megatron", "megatron-to-hf"):
        parser = directions.add_parser(direction, allow_abbrev=False)
        parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
        parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="distributed checkpoint")
        parser.add_argument("--verify", action="store_true", help="read both back and compare every tensor's checksum")
        if direction == "hf-to-megatron":
            parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the result, if not the files'")


def _convert(options: argparse.Namespace) -> None:
    import torch

    from megatron_opsd.convert import convert

    ranks = "RANK" in os.environ  # torchrun's
    if ranks:
        torch.distributed.init_process_group("gloo")
    if options.direction == "hf-to-megatron":
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
        convert.hf_to_megatron(options.hf, options.megatron, dtypes[options.dtype], options.verify)
    else:
        convert.megatron_to_hf(options.megatron, options.hf, options.verify)
    if ranks:
        torch.distributed.destroy_process_group()


CONVERT = "A Hugging Face directory to a distributed checkpoint of Megatron, or back. In one process or under torchrun."

COMMANDS = {
    "train": ("Train a model. Under torchrun, one process a GPU, or with --nproc.", _train, _add_nproc),
    "check": ("Find mistakes in a configuration without starting anything.", _check, _add_check_options),
    "plan": (
        "Memory, batch and checkpoint sizes of a run on a cluster. Needs no GPU and no weights.",
        _plan,
        _add_plan_options,
    ),
    "serve": (
        "Start a vLLM server that writes a run's rollouts (rollout.engine = 'server').",
        _serve,
        _add_serve_options,
    ),
    "evaluate": (
        "Greedy accuracy and Avg@k of a Hugging Face directory (model.path) on evaluate.data.",
        _evaluate,
        _add_evaluate_options,
    ),
}
