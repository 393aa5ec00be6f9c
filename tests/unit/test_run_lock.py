"""One living run a folder, with real processes and files."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_opsd.reliability import run_lock
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.reliability.run_lock import InUseError, Owner, RunLock

HERE = Owner.of_this_process({})
ELSEWHERE = replace(HERE, host="node7", machine="another machine", pid=4711, job="12")


def nothing_to_say(text: str) -> None:
    pytest.fail(text)


def write(folder: Path, owner: Owner, age: float = 0.0) -> Path:
    """The lock of another process, last refreshed ``age`` seconds ago."""
    file = folder / "lock"
    file.write_text(json.dumps(asdict(owner)))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_folder_is_taken_and_left(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire(nothing_to_say)
    assert lock.owner() == HERE
    assert not lock.is_anothers()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_of_this_machine_keeps_it(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from megatron_opsd.reliability.run_lock import RunLock\n"
    code += f"RunLock(Path({str(tmp_path)!r})).acquire(print); print('taken', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "taken\n"
    os.utime(tmp_path / "lock")  # its age is not what counts here
    lock = RunLock(tmp_path)
    with pytest.raises(InUseError, match=rf"process {process.pid} on \S+ trains there.*--logging.run_dir"):
        lock.acquire(nothing_to_say)
    RunDir(tmp_path).write_mistake("refused")  # what the command line does next
    assert not (tmp_path / "outcome").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock").exists()
    lock.acquire(nothing_to_say)  # at once: the process is dead
    lock.release()


def test_a_process_id_that_came_again_keeps_nothing(tmp_path: Path) -> None:
    write(tmp_path, replace(HERE, born="1"))
    lock = RunLock(tmp_path)
    lock.acquire(nothing_to_say)
    assert lock.owner() == HERE
    lock.release()


def test_one_that_nobody_refreshes_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.1)
    write(tmp_path, ELSEWHERE, age=3)
    lock = RunLock(tmp_path)
    lock.acquire(nothing_to_say)
    lock.release()
    write(tmp_path, ELSEWHERE, age=1)
    said: list[str] = []
    start = time.monotonic()
    lock = RunLock(tmp_path)
    lock.acquire(said.append)
    assert 0.5 < time.monotonic() - start < 5
    assert "process 4711 on node7, SLURM job 12 has it; seeing for up to 1 s" in said[0]
    lock.release()


def test_one_that_is_refreshed_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.1)
    file = write(tmp_path, ELSEWHERE, age=20)
    threading.Timer(0.5, lambda: os.utime(file)).start()
    said: list[str] = []
    with pytest.raises(InUseError, match="process 4711 on node7, SLURM job 12"):
        RunLock(tmp_path).acquire(said.append)
    assert len(said) == 1


def test_the_same_job_started_again_takes_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write(tmp_path, ELSEWHERE)
    lock = RunLock(tmp_path)
    lock.acquire(nothing_to_say)
    lock.release()
    write(tmp_path, replace(ELSEWHERE, restart=2))
    assert lock.is_anothers()


def _take(folder: Path, together: "multiprocessing.synchronize.Event", answers: "multiprocessing.Queue[str]") -> None:
    lock = RunLock(folder)
    together.wait()
    try:
        lock.acquire(lambda _: None)
        answers.put("taken")
        time.sleep(2)
    except InUseError:
        answers.put("refused")


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_only_one_gets_it(stale: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together, answers = context.Event(), context.Queue()
    if stale:
        write(tmp_path, ELSEWHERE, age=1000)
    processes = [context.Process(target=_take, args=(tmp_path, together, answers)) for _ in range(6)]
    for process in processes:
        process.start()
    together.set()
    found = [answers.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == ["refused"] * 5 + ["taken"]


def test_a_run_that_lost_its_folder_ends(tmp_path: Path) -> None:
    """It slept for minutes, and another one took over: it must not write there any more."""
    code = "import time; from pathlib import Path; from megatron_opsd.reliability import run_lock\n"
    code += "run_lock.REFRESH_SECONDS = 0.1\n"
    code += f"run_lock.RunLock(Path({str(tmp_path)!r})).acquire(print); print('taken', flush=True); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "taken\n"
    write(tmp_path, ELSEWHERE)
    assert "process 4711 on node7, SLURM job 12 has taken it over; leaving" in process.stdout.read()
    assert process.wait(timeout=10) == 1
