"""A real SLURM cluster on this machine: munged, slurmctld, and a slurmd for each virtual node. Needs root.

Each node has its own UTS, mount and process-id namespaces: its own host name, and a power switch, since the kernel ends
a process-id namespace with its first process. All nodes share the machine's loopback network. A node that loses power
closes its connections there, which its peers see at once; a real one falls silent.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = "slurmctld slurmd slurm-client munge"

# The first process of a node: bash, which also takes care of orphans. $1: name, $2: the hosts file, $3: slurm.conf.
NODE = """
hostname "$1" && mount --bind "$2" /etc/hosts || exit
slurmd -D -N "$1" -f "$3" &
wait
"""

# Periods are short, so that tests are: usual ones are cred_expire 120, KillWait 30, SlurmdTimeout 300.
# A requeued job waits for cred_expire before it starts again.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
KillWait=10
SlurmdTimeout=10
UnkillableStepTimeout=20
MessageTimeout=10
InactiveLimit=0
MinJobAge=3600
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.1.[1-{nodes}] Port=[{first}-{last}] CPUs=2 RealMemory=16000
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid():
        return "the SLURM tests start a cluster of their own and need root"
    if not all(shutil.which(name, path=_PATH) for name in DAEMONS):
        return f"the SLURM tests need Debian's packages: apt-get install --no-install-recommends {PACKAGES}"
    if subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode:
        return "the SLURM tests need the right to make namespaces; in a container: docker run --privileged"
    return ""


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


class Cluster:
    """``nodes`` idle nodes on entering, nothing left on leaving. Partition ``low`` gives way to ``main``.

    grace: seconds a job in ``low`` gets between its signal and its end.
    """

    def __init__(self, folder: Path, nodes: int = 4, grace: int = 60) -> None:
        self.folder, self.names = folder, [f"node{i + 1}" for i in range(nodes)]
        port = _free_ports(nodes + 1)
        host = socket.gethostname().split(".")[0]
        self._conf = folder / "slurm.conf"
        numbers = {"port": port, "first": port + 1, "last": port + nodes, "nodes": nodes, "grace": grace}
        folder.chmod(0o755)
        self._conf.write_text(CONF.format(folder=folder, host=host, **numbers))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        addresses = ["127.0.0.1 localhost", f"127.0.0.1 {host}"]
        addresses += [f"127.0.1.{i + 1} {name}" for i, name in enumerate(self.names)]
        (folder / "hosts").write_text("\n".join(addresses) + "\n")
        for name in ("state", "spool"):
            (folder / name).mkdir()
        inherited = {key: value for key, value in os.environ.items() if not re.match("SLURM|SBATCH|SRUN", key)}
        self.environment = inherited | {"SLURM_CONF": str(self._conf), "PATH": _PATH}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Self:
        try:
            key = self.folder / "munge.key"
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
            files = {"key-file": key, "socket": self.folder / "munge.sock", "pid-file": self.folder / "munge.pid"}
            files |= {"log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}
            self._start("munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
            hosts = 'mount --bind "$1" /etc/hosts && exec slurmctld -D -c -f "$2"'
            unshare = ("unshare", "--mount", "bash", "-c")
            self._start("slurmctld", *unshare, hosts, "-", str(self.folder / "hosts"), str(self._conf))
            for name in self.names:
                self.power_on(name)
            self.wait_for_idle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the cluster."""
        for name in reversed(list(self._daemons)):
            self._kill(name)

    def power_on(self, name: str) -> None:
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self._start(name, *_UNSHARE, "bash", "-c", NODE, "-", name, str(self.folder / "hosts"), str(self._conf))

    def power_off(self, name: str) -> None:
        """End all that runs on a node, without a word to anybody."""
        self._kill(name)

    @property
    def alive(self) -> list[str]:
        """The nodes that have power."""
        return [name for name in self.names if name in self._daemons]

    def power_on_all(self) -> None:
        for name in self.names:
            if name not in self._daemons:
                self.power_on(name)

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command as a user of the cluster; returns what it printed."""
        done = subprocess.run(
            command,
            env=self.environment | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """``scontrol show job``: JobState, Restarts, BatchHost, NodeList, ExitCode and more."""
        line = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in line.split() if "=" in part)

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_for_idle(self, timeout: float = 60) -> None:
        """Wait until every node is up and has nothing to do."""
        end = time.monotonic() + timeout
        while True:
            try:
                states = self.node_states()
            except AssertionError as error:  # slurmctld is still starting
                states = {"slurmctld": str(error)}
            if set(states) == set(self.names) and set(states.values()) == {"idle"}:
                return
            assert time.monotonic() < end, f"nodes are not idle after {timeout} s: {states}; see {self.folder}/*.log"
            time.sleep(0.3)

    def processes(self, node: str, *variables: str) -> list[int]:
        """Ids of the processes on ``node`` whose environment has all ``variables``, such as ``RANK=3`` or ``RANK=``."""
        namespace = Path(f"/proc/{self._first_process(node)}/ns/pid").readlink()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "ns" / "pid").readlink() == namespace:
                    environment = b"\0" + (folder / "environ").read_bytes()
                    if all(b"\0" + variable.encode() in environment for variable in variables):
                        found.append(int(folder.name))
            except OSError:  # has ended meanwhile
                continue
        return sorted(found)

    def _first_process(self, node: str) -> int:
        pid = self._daemons[node].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def _kill(self, name: str) -> None:
        process = self._daemons.pop(name)
        process.send_signal(signal.SIGKILL)  # of a node: `unshare`, whose child and all below it go with it
        process.wait(10)


def _free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that nobody uses."""
    for first in range(17800, 19800, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, sock in enumerate(sockets):
                sock.bind(("", first + i))
            return first
        except OSError:
            continue
        finally:
            for sock in sockets:
                sock.close()
    raise OSError("no free ports")
