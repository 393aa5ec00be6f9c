"""opsd_tiny.sh on a real SLURM: what happens to clusters happens to a run, and its weights come out the same.

`make test-slurm` runs this; each start of the four ranks takes a minute or two on two cores. The seconds that each
disturbance cost go to benchmarks/results/failures.md.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_opsd.reliability.run_dir import RunDir
from tests.distributed.runs import assert_equal_runs

from .cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch_scripts" / "opsd_tiny.sh"
RESULTS = ROOT / "benchmarks" / "results" / "failures.md"
STEPS = 16
SETTINGS = ("--train.steps", str(STEPS), "--logging.tensorboard", "false", "--logging.rollouts_interval", "0")
START = 300  # seconds the four ranks may take until their first step
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.fail(why)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def wait_until(what: str, condition: Callable[[], object], timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.2)


def parent(pid: int) -> int:
    """The parent's process id; 0 where the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Run:
    """A job that runs opsd_tiny.sh, and its run directory."""

    def __init__(self, cluster: Cluster, out: Path, *options: str, **environment: str):
        self.cluster, self.out = cluster, out
        self.log = out.with_suffix(".log")
        command = ("sbatch", "--parsable", f"--output={self.log}", *options, str(SCRIPT), *SETTINGS)
        self.job = cluster.run(*command, environment=ENVIRONMENT | {"OUT": str(out)} | environment)

    def record(self) -> dict[str, str]:
        return self.cluster.job(self.job)

    def metrics(self) -> list[dict]:
        return RunDir(self.out).repeatable_metrics()

    def step(self) -> int:
        """The last step it has recorded."""
        return max((line["step"] for line in self.metrics()), default=0)

    def checkpoint(self) -> int:
        names = [path.name for path in self.out.glob("checkpoints/step_*")]
        return max((int(name.removeprefix("step_")) for name in names), default=0)

    def processes(self, variable: str = "LOCAL_RANK=") -> list[tuple[str, int]]:
        """(node, process id) of the ranks and of all that they have started."""
        return [
            (node, pid)
            for node in self.cluster.alive
            for pid in self.cluster.processes(node, f"SLURM_JOB_ID={self.job}", variable)
        ]

    def ranks(self) -> list[tuple[str, int]]:
        """Those that torchrun has started."""
        found = self.processes()
        pids = {pid for _, pid in found}
        return [(node, pid) for node, pid in found if parent(pid) not in pids]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            state = self.record()["JobState"]
            assert state not in OVER or self.step() >= step, f"{state}:\n{self.tail()}"
            return self.step() >= step

        wait_until(f"step {step}\n{self.tail()}", reached, START)

    def wait_for_end(self, timeout: float = START) -> str:
        """Returns the job's last state."""
        wait_until(f"end of job {self.job}", lambda: self.record()["JobState"] in OVER, timeout)
        return self.record()["JobState"]

    def tail(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def assert_complete(self) -> None:
        assert self.wait_for_end() == "COMPLETED", self.tail()
        assert [line["step"] for line in self.metrics()] == list(range(1, STEPS + 1))
        assert RunDir(self.out).read_outcome()[0] == "finished"


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(cluster, tmp_path_factory.mktemp("undisturbed") / "run")
    run.wait_for_step(1)
    run.assert_complete()
    assert run.record()["Restarts"] == "0"
    return run


def test_torchrun_by_hand_does_the_same(undisturbed: Run, tmp_path: Path) -> None:
    """The same file, started by torchrun twice on this machine."""
    torchrun = ("timeout", "500", "torchrun", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
    port = str(random.randint(20000, 30000))
    command = (*torchrun, "--rdzv-endpoint", f"127.0.0.1:{port}", str(SCRIPT), *SETTINGS)
    virtual_environment = {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = os.environ | ENVIRONMENT | virtual_environment | {"OUT": str(tmp_path / "run")}
    output = (tmp_path / "output").open("w")
    nodes = [subprocess.Popen(command, env=environment, stdout=output, stderr=output) for _ in range(2)]
    try:
        assert [node.wait(500) for node in nodes] == [0, 0], (tmp_path / "output").read_text()
    finally:
        for node in nodes:
            node.terminate()
    assert_equal_runs(tmp_path / "run", undisturbed.out)


def test_a_finished_run_ends_at_once(cluster: Cluster, undisturbed: Run) -> None:
    """The rest of a chain of jobs: nothing is trained, nothing changes."""
    metrics, model = undisturbed.metrics(), (undisturbed.out / "hf" / "model.safetensors").read_bytes()
    rest = Run(cluster, undisturbed.out, "--dependency=singleton")
    rest.assert_complete()
    assert rest.record()["Restarts"] == "0"
    assert f"train.steps = {STEPS} is reached" in rest.tail()
    assert rest.metrics() == metrics
    assert (undisturbed.out / "hf" / "model.safetensors").read_bytes() == model


@dataclass
class Disturbance:
    """What a disturbance cost. Times are seconds since it."""

    name: str
    reached: int  # last step before it
    checkpoint: int  # the step the run went on from
    to_end: float  # until no rank ran any more
    to_restart: float  # until the job ran again
    to_new_step: float  # until the first step it had not done before


def disturb(run: Run, name: str, action: Callable[[], None]) -> Disturbance:
    """Let the run make a step, disturb it, and wait until it makes a new one."""
    restarts = int(run.record()["Restarts"])
    assert len(run.ranks()) == 4, run.ranks()
    before, processes = time.monotonic(), set(run.processes())
    action()
    wait_until("end of all ranks", lambda: not processes & set(run.processes()), 120)
    ended, reached = time.monotonic(), run.step()

    def runs_again() -> bool:
        record = run.record()
        assert record["JobState"] not in OVER, run.tail()
        return record["JobState"] == "RUNNING" and int(record["Restarts"]) > restarts

    wait_until(f"restart after {name}", runs_again, 120)
    started, checkpoint = time.monotonic(), run.checkpoint()
    run.wait_for_step(reached + 1)
    return Disturbance(name, reached, checkpoint, ended - before, started - before, time.monotonic() - before)


def test_whatever_happens_the_weights_are_the_same(cluster: Cluster, undisturbed: Run, tmp_path: Path) -> None:
    """One run in the partition that gives way, disturbed five times: a new step between any two of them."""
    run = Run(cluster, tmp_path / "run", "--partition=low")

    def kill_a_rank() -> None:
        node, pid = random.choice(run.ranks())
        print(f"kill -9 {pid} on {node}")
        os.kill(pid, signal.SIGKILL)

    def power_off(batch_host: bool) -> None:
        nodes = {node for node, _ in run.ranks()}
        (node,) = (node for node in nodes if (node == run.record()["BatchHost"]) == batch_host)
        cluster.power_off(node)

    def pre_empt() -> None:
        cluster.run("sbatch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")

    def signal_usr1() -> None:
        cluster.run("scancel", "--batch", "--signal=USR1", run.job)

    disturbances = {
        "a rank is killed": kill_a_rank,
        "the other node loses power": lambda: power_off(batch_host=False),
        "the batch script's node loses power": lambda: power_off(batch_host=True),
        "a job of higher priority comes": pre_empt,
        "USR1: the end of the job is near": signal_usr1,
    }
    costs = []
    run.wait_for_step(3)
    for name, action in disturbances.items():
        costs.append(disturb(run, name, action))
        print(costs[-1])
        cluster.power_on_all()
    write_results(costs)
    run.assert_complete()
    assert_equal_runs(run.out, undisturbed.out)
    for cost in costs[-2:]:  # a signal leaves time to save
        assert cost.checkpoint == cost.reached, cost


RESULTS_TEXT = """# What a disturbance costs

`opsd_tiny.sh` on a SLURM of four virtual nodes of one machine ({cores} cores, load {load:.1f}): 2 nodes x 2 CPU
processes, a checkpoint every 2 steps. `make test-slurm` disturbs one run as below, and requires that it ends with the
weights of an undisturbed one, bit for bit, and with each step once in metrics.jsonl. Seconds since the disturbance.

{table}

- **all ranks ended**: no process of the run is left on any node that has power.
- **job ran again**: SLURM has started it again. A requeued job waits for SLURM's `cred_expire` (5 s here, 120 s by
  default); that a node is gone SLURM notices after `SlurmdTimeout` and its next ping (10 s here, 300 s by default).
- **new step**: the run has made a step that it had not made before. Nearly all of it is the start of Python and vLLM,
  four times on {cores} cores, beside other work. A cluster's figures are its own.
"""


def write_results(costs: list[Disturbance]) -> None:
    header = ("disturbance", "step reached", "went on after step", "all ranks ended", "job ran again", "new step")
    rows = [
        (c.name, c.reached, c.checkpoint, *(f"{x:.0f} s" for x in (c.to_end, c.to_restart, c.to_new_step)))
        for c in costs
    ]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    RESULTS.write_text(RESULTS_TEXT.format(table="\n".join(lines), load=os.getloadavg()[0], cores=os.cpu_count()))


# The batch script's decisions, with a stand-in for torchrun that runs the lines of a test.


@pytest.fixture
def stand_in(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    def submit(lines: str, *options: str, **environment: str) -> Run:
        programs = tmp_path / "venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
        (programs / "torchrun").write_text(f"#!/bin/bash\n{lines}\n")
        (programs / "torchrun").chmod(0o755)
        return Run(cluster, tmp_path / "run", *options, VENV=str(programs.parent), **environment)

    yield submit
    cluster.power_on_all()


def test_a_run_that_always_dies_is_given_up(stand_in: Callable[..., Run]) -> None:
    run = stand_in("kill -9 $$", MAX_RESTARTS="2")
    assert run.wait_for_end(90) == "FAILED"
    assert run.record()["Restarts"] == "2"
    assert "giving up: crashed 3 times in a row without a new checkpoint (newest: none, MAX_RESTARTS=2)" in run.tail()
    outcome, why = RunDir(run.out).read_outcome()
    assert outcome == "stopped"
    assert why.startswith("crashed 3 times in a row")


def test_progress_pardons_crashes(stand_in: Callable[..., Run]) -> None:
    run = stand_in(
        """
        n=${SLURM_RESTART_COUNT:-0}
        [ $n = 3 ] && { echo finished >$OUT/outcome; exit 0; }
        mkdir -p $OUT/checkpoints/step_00000$n
        exit 1
        """,
        MAX_RESTARTS="1",
    )
    assert run.wait_for_end(90) == "COMPLETED", run.tail()
    assert run.record()["Restarts"] == "3"


def test_a_stopped_run_is_not_requeued(stand_in: Callable[..., Run]) -> None:
    run = stand_in("echo 'stopped: the learning rate is a fish' >$OUT/outcome; exit 1")
    assert run.wait_for_end(60) == "FAILED"
    assert run.record()["Restarts"] == "0"
    assert "opsd_tiny.sh: stopped: the learning rate is a fish" in run.tail()


def test_a_cancelled_run_is_not_requeued(cluster: Cluster, stand_in: Callable[..., Run]) -> None:
    run = stand_in("STAND_IN=1 sleep 300")
    wait_until("two nodes at work", lambda: len({node for node, _ in run.processes("STAND_IN=")}) == 2, 30)
    cluster.run("scancel", run.job)
    assert run.wait_for_end(60) == "CANCELLED"
    time.sleep(10)  # longer than a requeued job would wait
    assert run.record()["JobState"] == "CANCELLED"
    assert run.record()["Restarts"] == "0"


def test_a_run_that_takes_its_node_along_is_given_up(cluster: Cluster, stand_in: Callable[..., Run]) -> None:
    """The batch script dies with its node, and SLURM starts the job again: still no more than MAX_RESTARTS times."""
    run = stand_in("STAND_IN=1 sleep 300", MAX_RESTARTS="0")
    wait_until("two nodes at work", lambda: len({node for node, _ in run.processes("STAND_IN=")}) == 2, 30)
    cluster.power_off(run.record()["BatchHost"])
    assert run.wait_for_end(120) == "FAILED"
    assert run.record()["Restarts"] == "1"
    assert "giving up: crashed 1 times" in run.tail()


def test_a_chain_of_jobs_goes_on_where_sites_forbid_requeues(cluster: Cluster, stand_in: Callable[..., Run]) -> None:
    """One after the other, as they share a name: the first is interrupted, the second ends the run."""
    lines = """
        [ $SLURM_NODEID = 0 ] || { sleep 3; exit 0; }
        n=$(cat $OUT/n 2>/dev/null || echo 0)
        echo $((n + 1)) >$OUT/n
        [ $n = 0 ] && echo interrupted >$OUT/outcome || echo finished >$OUT/outcome
        sleep 3
        """
    options = ("--no-requeue", "--dependency=singleton")
    first = stand_in(lines, *options)
    rest = [Run(cluster, first.out, *options, VENV=str(first.out.with_name("venv"))) for _ in range(2)]
    assert first.wait_for_end(60) == "FAILED"
    assert f"job {first.job} could not be requeued; submit it again to go on from none" in first.tail()
    assert [run.wait_for_end(60) for run in rest] == ["COMPLETED", "COMPLETED"]
    assert (first.out / "n").read_text() == "3\n"


def test_two_jobs_do_not_share_a_folder(cluster: Cluster, stand_in: Callable[..., Run]) -> None:
    first = stand_in("STAND_IN=1 sleep 300")
    wait_until("two nodes at work", lambda: len({node for node, _ in first.processes("STAND_IN=")}) == 2, 30)
    second = Run(cluster, first.out, VENV=str(first.out.with_name("venv")))
    assert second.wait_for_end(60) == "FAILED"
    assert f"OUT={first.out}: job {first.job} (RUNNING) trains there" in second.tail()
    assert first.record()["JobState"] == "RUNNING"
    assert (first.out / "restarts").read_text().split()[0] == first.job
    cluster.run("scancel", first.job)
    assert first.wait_for_end(60) == "CANCELLED"


def test_a_mistake_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "run", MODEL=str(tmp_path / "nowhere"))
    assert run.wait_for_end() == "FAILED"
    assert run.record()["Restarts"] == "0"
    assert "nowhere" in RunDir(run.out).read_outcome()[1]
