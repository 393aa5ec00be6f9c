"""Every row of the tables in bad_inputs/ costs one line and exit status 2, before anything expensive."""

import importlib
import pkgutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

from megatron_opsd import cli
from megatron_opsd.weights.hf_files import HFReader

from . import bad_inputs
from .bad_inputs import Bad, Inputs

TABLES = [name for _, name, _ in pkgutil.iter_modules(bad_inputs.__path__)]
ROWS = [
    pytest.param(row, id=f"{table}: {row.what}")
    for table in TABLES
    for row in importlib.import_module(f"{bad_inputs.__name__}.{table}").ROWS
]


@pytest.fixture(autouse=True)
def nothing_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a process group nor the bytes of a weight."""

    def begun(*_: object, **__: object) -> NoReturn:
        pytest.fail("something expensive has begun")

    monkeypatch.setattr(dist, "init_process_group", begun)
    monkeypatch.setattr(HFReader, "read", begun)


def arguments(row: Bad, inputs: Inputs) -> list[str]:
    """Of the command line."""
    name, *options = [option.format(folder=inputs.folder) for option in row.command]
    settings = {setting: value.format(folder=inputs.folder) for setting, value in row.settings.items()}
    return [name, *([] if name == "convert" else [str(inputs.toml)]), *options, *cli.flags(settings)]


@pytest.mark.parametrize("row", ROWS)
def test_costs_one_line(row: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = Inputs(tmp_path)
    row.change(inputs)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments(row, inputs))
    out, err = capsys.readouterr()
    assert end.value.code == 2, out + err
    (line,) = err.splitlines()
    for part in row.says:
        assert part.format(folder=tmp_path) in line, line
    assert not (tmp_path / "run").exists() or row.command[0] != "check"


def test_inputs_have_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", str(Inputs(tmp_path).toml)])
    assert capsys.readouterr().out.endswith("no mistakes found\n")


def test_tables_are_large() -> None:
    """Many causes of each kind, so that the kind is mended and not an input."""
    assert len(TABLES) >= 1
    assert len({row.id for row in ROWS}) == len(ROWS)
