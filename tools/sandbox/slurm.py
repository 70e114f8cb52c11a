"""A real Slurm of two nodes on this one machine, to try a launch without a cluster.

    sudo python3 tools/sandbox/slurm.py install   # Debian's packages, if missing
    python3 tools/sandbox/slurm.py start DIR      # returns once both nodes are idle
    export SLURM_CONF=DIR/slurm.conf              # ``start`` prints this line
    srun -N2 -n2 hostname
    sinfo; squeue; sbatch job.sh; sacct           # all of Slurm, with accounting
    python3 tools/sandbox/slurm.py stop DIR       # cancels its jobs and ends the daemons

It runs munged, mariadbd, slurmdbd, slurmctld and two slurmd (nodes n1 and n2, both this machine, each with all of its
cores) as the user who starts it, and runs that user's jobs only. DIR (mode 0700) holds everything: configuration, munge
key, socket, logs (``log/``), process IDs (``processes.json``). Its path must be short, because the address of a Unix
socket holds 107 characters. Ports are free ones. Another Slurm and other processes of the machine are not affected.

``sbatch --test-only --partition=imagined`` tells whether a job fits a cluster of 600 nodes with 8 GPUs each. The nodes
do not exist: a job that is submitted to them waits forever.

Debian's packages also install system services, which the sandbox neither needs nor touches.

What differs from a cluster: node names do not resolve (``scontrol show node n1`` knows the address), both nodes see the
same memory, jobs are not confined to their cores, and the two GPUs of a node are counted but do not exist.

Only Python's standard library is used. Exit codes: 0 done, 1 with one line on standard error.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import accounting
import daemons
from daemons import SECONDS, SandboxError, command_line, is_running, read_processes, wait_for, write_secret

NODES = ("n1", "n2")
DEVICES = ("/dev/null", "/dev/zero")
"""Devices of each node that Slurm counts as GPUs, to try jobs that request them."""
PARTITION = "main"
IMAGINED = "imagined"
"""Partition of GPU nodes that do not exist, to try jobs of a large cluster with --test-only."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "sinfo", *accounting.PROGRAMS)
SOCKET_LENGTH = 107
"""Longest path of a Unix socket, in bytes (unix(7))."""
LONGEST_SOCKET = "/" + accounting.SOCKET

CONFIGURATION = """\
ClusterName={cluster}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is requeued waits for its credentials to expire, by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true

# No control groups and no systemd, which a container lacks.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
{accounting}
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Both nodes have all cores of this machine, regardless of its sockets and threads.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# Start jobs immediately, requeued ones too (by default every 60 s). Only the backfill scheduler starts heterogeneous
# jobs (by default every 30 s).
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
# That scheduler runs only after a change. A requeued job becoming eligible is none; recomputed priorities are.
PriorityType=priority/multifactor
PriorityCalcPeriod=00:01:00

# A busy machine must not count as a failed node.
MessageTimeout=60
BatchStartTimeout=60
SlurmdTimeout=0
# Seconds after which a cancelled process is killed.
KillWait=5

{nodes}
PartitionName={partition} Nodes={names} Default=YES MaxTime=INFINITE State=UP

# Slurm considers cloud nodes usable without contacting them. Each is a DGX H100: 8 GPUs, 112 cores with two threads
# each, 2 TB of memory (NVIDIA DGX H100/H200 User Guide, hardware overview).
GresTypes=gpu
NodeName=g[1-600] NodeAddr=127.0.0.1 Port=1 CPUs=224 RealMemory=2000000 Gres=gpu:h100:8 State=CLOUD
PartitionName={imagined} Nodes=g[1-600] MaxTime=INFINITE State=UP
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=86400
SuspendExcNodes={names}
"""


def install() -> None:
    """Install the Debian packages."""
    daemons.install_packages("Slurm", PROGRAMS, ["slurm-wlm", "munge", *accounting.PACKAGES])


def start(folder: Path) -> None:
    """Start the daemons in ``folder``, which is created, and wait until all nodes are idle.

    Raises:
        SandboxError: Slurm is not installed, ``folder`` cannot be used or is in use, or a daemon did not start,
            in which case the others are stopped.
    """
    daemons.require_installed("Slurm", PROGRAMS)
    longest = SOCKET_LENGTH - len(LONGEST_SOCKET)
    if len(os.fsencode(folder)) > longest:
        raise SandboxError(f"{folder} is too long a path for a Unix socket; use one of at most {longest} bytes")
    if re.search(r"[\s,#=%]", str(folder)):
        raise SandboxError(
            f"{folder} has a space or one of ',#=%' in its path, which slurm.conf cannot hold; use another"
        )
    daemons.require_free(folder, "slurm.conf")
    daemons.prepare(folder, ("log", "state", *(f"spool/{node}" for node in NODES)))
    (folder / "munge.socket").unlink(missing_ok=True)  # left by a sandbox that did not stop cleanly
    write_secret(folder / "munge.key", os.urandom(128))
    write_configuration(folder)
    try:
        # --force, because munged insists on a socket that every user of the machine can reach.
        munge_files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "seed")]
        launch(folder, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge_files)
        wait_for(folder, "munged", (folder / "munge.socket").is_socket)
        accounting.start(folder, environment_of(folder))
        # -c: forget the jobs of an earlier sandbox in this folder.
        launch(folder, "slurmctld", "-D", "-c")
        for node in NODES:
            launch(folder, "slurmd", "-D", "-N", node, name=f"slurmd-{node}")
        wait_for(folder, "all nodes idle", lambda: node_states(folder) == ["idle"] * len(NODES))
    except BaseException:
        daemons.end_daemons(folder)
        raise


def stop(folder: Path) -> None:
    """Cancel all jobs of the sandbox in ``folder``, wait for them to end, then end its daemons; its logs stay.

    Raises:
        SandboxError: there is no sandbox in ``folder``, or something did not end.
    """
    daemons.require_sandbox(folder, "slurm.conf")
    controller = read_processes(folder).get("slurmctld")
    if controller is not None and is_running(*controller):
        # Before the daemons: nodes end the processes of their jobs.
        ask(folder, "scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + SECONDS
        while jobs := ask(folder, "squeue", "--noheader", "--format=%A").split():
            if time.monotonic() > deadline:
                raise SandboxError(f"job {', '.join(jobs)} did not end within {SECONDS:g} s; see {folder}/log")
            time.sleep(0.2)
    daemons.end_daemons(folder)


def write_configuration(folder: Path) -> None:
    """Write ``slurm.conf`` with ports that are currently free."""
    controller_port, accounting_port, *node_ports = daemons.free_ports(2 + len(NODES))
    host, cpus = socket.gethostname().split(".")[0], os.cpu_count() or 1
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:h100:{len(DEVICES)}"
        for name, port in zip(NODES, node_ports, strict=True)
    ]
    text = CONFIGURATION.format(
        cluster=accounting.CLUSTER,
        accounting=accounting.configure(folder, accounting_port),
        host=host,
        controller_port=controller_port,
        user=getpass.getuser(),
        folder=folder,
        nodes="\n".join(lines),
        names=",".join(NODES),
        partition=PARTITION,
        imagined=IMAGINED,
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"Name=gpu Type=h100 File={','.join(DEVICES)}\n")


def launch(folder: Path, program: str, *arguments: str, name: str | None = None) -> None:
    """Start one of Slurm's daemons."""
    daemons.launch(folder, program, *arguments, name=name, environment=environment_of(folder))


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment without variables of another Slurm."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    return kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": daemons.SEARCH_PATH}


def ask(folder: Path, program: str, *arguments: str) -> str:
    """Return the output of a Slurm program; empty if it failed, for example while the controller starts."""
    done = subprocess.run(
        [program, *arguments], env=environment_of(folder), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else ""


def node_states(folder: Path) -> list[str]:
    """Return the states of the real nodes; empty before the controller answers."""
    return ask(folder, "sinfo", f"--partition={PARTITION}", "--noheader", "--Node", "--format=%T").split()


def main() -> None:
    """Run the command line."""

    def started(folder: Path) -> str:
        start(folder)
        return f"export SLURM_CONF={folder}/slurm.conf"

    helps = (
        "install Debian's packages if missing (root)",
        "start it and wait until both nodes are idle",
        "cancel its jobs, stop it",
    )
    command_line("A real Slurm of two nodes on this one machine.", helps, install, started, stop)


if __name__ == "__main__":
    main()
