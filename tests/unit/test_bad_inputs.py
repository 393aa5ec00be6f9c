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
from .bad_inputs import Bad, Inputs, what_check_sees

TABLES = [name for _, name, _ in pkgutil.iter_modules(bad_inputs.__path__)]
ROWS = [
    pytest.param(row, id=f"{table}: {row.what}")
    for table in TABLES
    for row in importlib.import_module(f"{bad_inputs.__name__}.{table}").ROWS
]
WARNINGS = [pytest.param(row, id=row.what) for row in what_check_sees.WARNINGS]


@pytest.fixture(autouse=True)
def nothing_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a process group nor the bytes of a weight."""

    def begun(*_: object, **__: object) -> NoReturn:
        pytest.fail("something expensive has begun")

    monkeypatch.setattr(dist, "init_process_group", begun)
    monkeypatch.setattr(HFReader, "read", begun)


def arguments(row: Bad, inputs: Inputs) -> list[str]:
    """Of the command line."""
    folder = str(inputs.folder)
    name, *options = [option.replace("{folder}", folder) for option in row.command]
    settings = {setting: value.replace("{folder}", folder) for setting, value in row.settings.items()}
    return [name, *([] if name == "convert" else [str(inputs.toml)]), *options, *cli.flags(settings)]


@pytest.mark.parametrize("row", ROWS)
def test_costs_one_line(
    row: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(tmp_path)
    row.change(inputs)
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value)
    before = _files(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments(row, inputs))
    out, err = capsys.readouterr()
    assert end.value.code == 2, out + err
    (line,) = err.splitlines()
    for part in row.says:
        assert part.replace("{folder}", str(tmp_path)) in line, line
    after = _files(tmp_path)
    after.pop(tmp_path / "run" / "outcome", None)  # for a batch script that would start the run again
    assert after == before, "something was written"


def _files(folder: Path) -> dict[Path, int]:
    """Every file and the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("row", WARNINGS)
def test_costs_a_warning(row: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What may be meant so is said, and no more."""
    inputs = Inputs(tmp_path)
    row.change(inputs)
    cli.main(arguments(row, inputs))
    warning, end = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: ")
    for part in row.says:
        assert part.replace("{folder}", str(tmp_path)) in warning, warning
    assert end.endswith("no mistakes found")


def test_inputs_have_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", str(Inputs(tmp_path).toml)])
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'run.toml'}: no mistakes found\n"
    assert err == ""


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_large(table: str) -> None:
    """Many causes of each kind, so that the kind is mended and not an input."""
    causes = {row.id for row in ROWS if str(row.id).startswith(f"{table}: ")}
    assert len(causes) >= 15
