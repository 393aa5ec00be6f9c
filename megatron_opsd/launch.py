"""What the Python side of a launch script does: variables of the environment become settings of ``opsd train``.

Missing variables, and missing flags of torchrun, cost one line.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_opsd import cli
from megatron_opsd.config import Config
from megatron_opsd.config_file import add_overrides, load_config
from megatron_opsd.errors import UserError
from megatron_opsd.reliability.resume import complete_ones
from megatron_opsd.reliability.run_dir import RunDir


def main(recipe: str, model: str = "", problems: str = "", settings: Mapping[str, str] | None = None) -> None:
    """Train ``examples/<recipe>.toml`` under torchrun, with MODEL, DATA, OUT and RECIPE from the environment.

    RECIPE names another file of examples/ than ``recipe``, such as that of another method.

    recipe, model, problems: below examples/. ``model`` is used where MODEL is not set; ``problems`` is a script that
        writes train.jsonl and test.jsonl where DATA is not set.
    settings: of this launch script, below those of the environment and of the command line.
    """
    script = Path(sys.argv[0]).resolve()
    examples = script.parents[1] / "examples"
    name = script.stem.removeprefix("opsd_")
    run_dir = Path(os.environ.get("OUT") or f"runs/{name}").absolute()
    overrides = {**(settings or {}), "logging.run_dir": str(run_dir), "checkpoint.resume": "auto"}
    overrides["model.path"] = os.environ.get("MODEL") or (model and str(examples / model))
    overrides["data.path"] = os.environ.get("DATA", "")
    arguments = [*sys.argv[1:], *_going_on(run_dir)]
    command_line = _settings(arguments)
    toml = str(examples / f"{os.environ.get('RECIPE') or recipe}.toml")
    try:
        known = {name: value for name, value in overrides.items() if value}
        check_torchrun(script, load_config(toml, known | command_line))
        if problems and not overrides["data.path"]:
            overrides["data.path"] = str(write_problems(examples / problems, run_dir / "data") / "train.jsonl")
        if problems:
            overrides["evaluate.data.path"] = str(Path(overrides["data.path"]).with_name("test.jsonl"))
        check_variables(overrides | command_line)
        cli.main(["train", toml, *cli.flags(overrides), *arguments])
    except UserError as error:
        _leave(run_dir, error, f"{script.name}: {error}")
    except SystemExit as end:
        if end.code == 2:  # a mistake, which the command line has explained
            _leave(run_dir, end.__context__)
        raise


def _going_on(run_dir: Path) -> list[str]:
    """A job that SLURM has started again goes on from its own checkpoints, even if it began from another run's."""
    again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return ["--checkpoint.resume", "auto"] if again and complete_ones(RunDir(run_dir).checkpoints) else []


def torchrun_command(script: Path) -> str:
    """The command that starts a launch script by hand on each node; the script's comments have it."""
    found = re.search(r"^# +(torchrun .*)$", script.read_text(), flags=re.MULTILINE)
    assert found, script
    return found[1]


def check_torchrun(script: Path, config: Config) -> None:
    """Raise UserError where torchrun, or its flags, are missing."""
    if "RANK" not in os.environ:
        raise UserError(f"needs torchrun, on each node: {torchrun_command(script)}; or in a SLURM cluster: sbatch")
    layout = config.parallel
    needed = max(
        layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size * layout.pipeline_model_parallel_size,
    )
    if os.environ["WORLD_SIZE"] == "1" and needed > 1:
        raise UserError(
            f"torchrun started one process, the model needs {needed}; on each node: {torchrun_command(script)}"
        )


def check_variables(settings: Mapping[str, str]) -> None:
    """Raise UserError unless model and data are named."""
    what = {
        "model.path": "MODEL (a Hugging Face directory)",
        "data.path": "DATA (problems with worked solutions: JSONL, JSON, parquet)",
    }
    missing = [text for name, text in what.items() if not settings.get(name)]
    if missing:
        raise UserError(f"set the environment variable{'s' * (len(missing) > 1)} {' and '.join(missing)}")


def write_problems(script: Path, folder: Path) -> Path:
    """Let ``script`` write data into ``folder``. One process of each node does, the fastest one's files stay."""
    if os.environ["LOCAL_RANK"] == "0" and not folder.exists():
        staging = folder.with_name(f".data.{socket.gethostname()}.{os.getpid()}")
        subprocess.run([sys.executable, script, "--out", staging], check=True, stdout=subprocess.DEVNULL)
        try:
            staging.rename(folder)
        except OSError:  # another node was faster, with the same problems
            shutil.rmtree(staging)
    return folder


def _settings(arguments: Sequence[str]) -> dict[str, str]:
    """Those of the command line. What is no setting is left to ``opsd train`` to complain about."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_overrides(parser)
    return vars(parser.parse_known_args(arguments)[0])


def _leave(run_dir: Path, error: BaseException | None, message: str = "") -> NoReturn:
    """One process of a node says what is wrong, and leaves it where the batch script looks before it requeues."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if message:
            print(message, file=sys.stderr, flush=True)
        if "RANK" in os.environ:
            RunDir(run_dir).write_mistake(str(error or "a mistake in the command line"))
    elif message:
        time.sleep(3)  # torchrun ends local rank 0 when another one has left: not before it has spoken
    sys.exit(2)
