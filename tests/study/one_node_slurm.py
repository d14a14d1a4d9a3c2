"""A Slurm of one node on this machine, started and stopped by the test that uses it."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("sbatch", "munged", "slurmctld", "slurmd")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
MISSING = next((name for name in PROGRAMS if shutil.which(name, path=PATH) is None), None)
NO_SLURM = f"no {MISSING} on this machine: apt-get install slurm-wlm munge, and run again"

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=5
KillWait=10
MaxArraySize={longest}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def one_node_slurm(folder: Path, longest: int = 20) -> Iterator[dict[str, str]]:
    """Yields an environment in which Slurm's commands speak to it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(
            folder=folder, host=socket.gethostname().split(".")[0], user=getpass.getuser(),
            ports=(_free_port(), _free_port()), cpus=os.cpu_count(), longest=longest,
        )
    )  # fmt: skip
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(config)}
    own = [f"--{name}={folder}/munge.{name[:-5]}" for name in ("pid-file", "log-file", "seed-file")]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}",
         f"--socket={folder}/munge.socket", *own],
        ["slurmctld", "-D", "-f", str(config), "-L", str(folder / "slurmctld.log")],
        ["slurmd", "-D", "-f", str(config), "-L", str(folder / "slurmd.log")],
    ]  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in ask(environment, "sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < deadline, f"Slurm did not start, see {folder}"
            time.sleep(1)
        yield environment
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, check=False)
        time.sleep(2)
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(30)


def ask(environment: dict[str, str], *command: str) -> str:
    """What one of Slurm's commands prints."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
