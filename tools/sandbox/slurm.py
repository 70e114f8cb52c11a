"""A real Slurm of two nodes on this one machine, to try a launch without a cluster.

    sudo python3 tools/sandbox/slurm.py install   # Debian packages slurm-wlm and munge, unless they are there
    python3 tools/sandbox/slurm.py start DIR      # returns once both nodes are idle
    export SLURM_CONF=DIR/slurm.conf              # ``start`` prints this line
    srun -N2 -n2 hostname
    sinfo; squeue; sbatch job.sh                  # everything that Slurm has, but for accounting (sacct)
    python3 tools/sandbox/slurm.py stop DIR       # cancels what runs and ends the daemons

It runs munged, slurmctld and two slurmd (nodes n1 and n2, both this machine, each with all of its cores) as the user
who starts it, and runs that user's jobs only. All that belongs to it lies in DIR: configuration, munge key, socket,
logs (``log/``), the numbers of its processes (``processes.json``). DIR is made readable by its owner alone and must be
short, because the address of a Unix socket holds 107 characters. The ports are free ones, and a Slurm that runs on the
machine for real is left alone, as are all processes that were not started here.

Debian's packages bring services of the system too; the sandbox neither needs nor touches them.

What differs from a cluster: node names do not resolve (``scontrol show node n1`` knows the address), both nodes see the
same memory and GPUs, and nothing keeps a job to the cores that it was given.

Only Python's standard library is used. Exit codes: 0 done, 1 with one line on standard error.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "sinfo")
SECONDS = 120.0
"""How long the daemons may take to start, or the jobs and they to end; seconds are usual, a busy machine needs more."""
SOCKET_LENGTH = 107
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
"""Debian leaves the folders of daemons out of an ordinary user's PATH."""

CONFIGURATION = """\
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true

# Neither control groups nor systemd, which a container has not.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Both nodes have the cores of this machine, however they are divided into sockets and threads.
SlurmdParameters=config_overrides
ReturnToService=2

# A busy machine is no failed node.
MessageTimeout=60
BatchStartTimeout=60
SlurmdTimeout=0
# What does not end by itself when cancelled is killed after this many seconds.
KillWait=5

{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


class SandboxError(Exception):
    """What a user can put right, in one line."""


def install() -> None:
    """Install Debian's packages unless all programs are there.

    Raises:
        SandboxError: no apt-get, not root, or apt-get failed.
    """
    if not missing_programs():
        return
    what = f"Slurm is not installed here ({', '.join(missing_programs())} not found)"
    if shutil.which("apt-get") is None:
        raise SandboxError(f"{what} and there is no apt-get; install Slurm and MUNGE in this system's way")
    if os.geteuid() != 0:
        raise SandboxError(f"{what}; run as root: apt-get install slurm-wlm munge")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
    for arguments in (["update", "-qq"], packages):
        done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            reason = last_line(done.stderr) or last_line(done.stdout)
            raise SandboxError(f"apt-get {arguments[0]} failed with {done.returncode}: {reason}")
    if missing_programs():
        raise SandboxError(f"slurm-wlm and munge of this system lack {', '.join(missing_programs())}")


def start(folder: Path) -> None:
    """Start the daemons in ``folder``, which is made, and wait until all nodes are idle.

    Raises:
        SandboxError: Slurm is not installed, ``folder`` cannot be used or is in use, or a daemon did not come up;
            what was started is ended again then.
    """
    if missing_programs():
        raise SandboxError(
            f"Slurm is not installed here ({', '.join(missing_programs())} not found); run as root: "
            f"python3 {sys.argv[0]} install"
        )
    if len(os.fsencode(folder / "munge.socket")) > SOCKET_LENGTH:
        raise SandboxError(
            f"{folder} is too long a path for a Unix socket; use one below {SOCKET_LENGTH - 15} characters"
        )
    if re.search(r"[\s,#=%]", str(folder)):
        raise SandboxError(
            f"{folder} has a space or one of ',#=%' in its path, which slurm.conf cannot hold; use another"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / "slurm.conf").is_file():
        raise SandboxError(f"{folder} is not empty and no sandbox; name a new folder")
    if any(is_running(*process) for process in read_processes(folder).values()):
        raise SandboxError(f"{folder} is running already; stop it with: python3 {sys.argv[0]} stop {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("log", "state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("processes.json", "munge.socket"):  # of a sandbox that did not end in order
        (folder / name).unlink(missing_ok=True)
    write_key(folder / "munge.key")
    write_configuration(folder)
    try:
        # --force, because munged wants its socket where every user of the machine can reach it.
        munge_files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "seed")]
        launch(folder, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge_files)
        wait_for(folder, "munged", (folder / "munge.socket").is_socket)
        # -c: the jobs of an earlier sandbox in this folder are gone.
        launch(folder, "slurmctld", "-D", "-c")
        for node in NODES:
            launch(folder, "slurmd", "-D", "-N", node, name=f"slurmd-{node}")
        wait_for(folder, "all nodes idle", lambda: node_states(folder) == ["idle"] * len(NODES))
    except BaseException:
        end_daemons(folder)
        raise


def stop(folder: Path) -> None:
    """Cancel all jobs of the sandbox in ``folder``, wait for them to end, then end its daemons; its logs stay.

    Raises:
        SandboxError: there is no sandbox in ``folder``, or something did not end.
    """
    if not (folder / "slurm.conf").is_file():
        raise SandboxError(f"{folder} holds no sandbox")
    controller = read_processes(folder).get("slurmctld")
    if controller is not None and is_running(*controller):
        # Before the daemons: what runs for a job is ended by its node.
        ask(folder, "scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + SECONDS
        while jobs := ask(folder, "squeue", "--noheader", "--format=%A").split():
            if time.monotonic() > deadline:
                raise SandboxError(f"job {', '.join(jobs)} did not end within {SECONDS:g} s; see {folder}/log")
            time.sleep(0.2)
    end_daemons(folder)


def missing_programs() -> list[str]:
    """Those of Slurm's programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


def write_key(path: Path) -> None:
    """A new key, readable by its owner alone from the first moment."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
        handle.write(os.urandom(128))


def write_configuration(folder: Path) -> None:
    """``slurm.conf`` with ports that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(NODES))]
    controller_port, *node_ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    host, cpus = socket.gethostname().split(".")[0], os.cpu_count() or 1
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
        for name, port in zip(NODES, node_ports, strict=True)
    ]
    text = CONFIGURATION.format(
        host=host,
        controller_port=controller_port,
        user=getpass.getuser(),
        folder=folder,
        nodes="\n".join(lines),
        names=",".join(NODES),
    )
    (folder / "slurm.conf").write_text(text)


def launch(folder: Path, program: str, *arguments: str, name: str | None = None) -> None:
    """Start a daemon that outlives this process, and note its number and start time."""
    name = name or program
    executable = shutil.which(program, path=SEARCH_PATH)
    assert executable is not None, program
    with (folder / f"log/{name}.out").open("wb") as output:
        process = subprocess.Popen(
            [executable, *arguments],
            cwd=folder,
            env=environment_of(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # A number is given anew once its process has ended; number and start time together are not.
    processes = read_processes(folder) | {name: (process.pid, start_time(process.pid))}
    (folder / "processes.json").write_text(json.dumps(processes))


def environment_of(folder: Path) -> dict[str, str]:
    """This process's environment without what another Slurm put there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    return kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH_PATH}


def ask(folder: Path, program: str, *arguments: str) -> str:
    """Standard output of one of Slurm's programs; empty if it failed, as it does while its controller comes up."""
    done = subprocess.run(
        [program, *arguments], env=environment_of(folder), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else ""


def node_states(folder: Path) -> list[str]:
    """State of every node; none before the controller answers."""
    return ask(folder, "sinfo", "--noheader", "--Node", "--format=%T").split()


def wait_for(folder: Path, what: str, ready: Callable[[], bool]) -> None:
    """Wait until ``ready()``.

    Raises:
        SandboxError: a daemon ended meanwhile, or it took too long.
    """
    deadline = time.monotonic() + SECONDS
    while not ready():
        for name, process in read_processes(folder).items():
            if not is_running(*process):
                log = folder / f"log/{name}.out"
                raise SandboxError(
                    f"{name} ended at its start: {last_line(log.read_text(errors='replace'))} (see {log})"
                )
        if time.monotonic() > deadline:
            raise SandboxError(f"no {what} within {SECONDS:g} s; see {folder}/log")
        time.sleep(0.1)


def end_daemons(folder: Path) -> None:
    """End the daemons of ``folder``, the last started first.

    Raises:
        SandboxError: one did not end, not even when killed.
    """
    for name, process in reversed(read_processes(folder).items()):
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + SECONDS / 4
            if is_running(*process):
                os.kill(process[0], number)
            while is_running(*process) and time.monotonic() < deadline:
                time.sleep(0.05)
        if is_running(*process):
            raise SandboxError(f"{name} (process {process[0]}) did not end")
    (folder / "processes.json").unlink(missing_ok=True)


def read_processes(folder: Path) -> dict[str, tuple[int, str]]:
    """Number and start time of every daemon of ``folder`` that was started, in that order."""
    path = folder / "processes.json"
    if not path.is_file():
        return {}
    return {name: (int(number), str(started)) for name, (number, started) in json.loads(path.read_text()).items()}


def is_running(number: int, started: str) -> bool:
    """Whether the process of this number is still the one that started then, and has not ended."""
    return bool(started) and start_time(number) == started


def start_time(number: int) -> str:
    """When a process started, in clock ticks since boot; empty if there is none or it has ended (proc(5))."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def last_line(text: str) -> str:
    """The last line of ``text`` that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description="A real Slurm of two nodes on this one machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="install Debian's packages unless they are there (root)")
    for command, text in (
        ("start", "start it and wait until both nodes are idle"),
        ("stop", "cancel its jobs, end it"),
    ):
        commands.add_parser(command, help=text).add_argument("folder", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    try:
        if arguments.command == "install":
            install()
        elif arguments.command == "start":
            start(arguments.folder.absolute())
            print(f"export SLURM_CONF={arguments.folder.absolute()}/slurm.conf")
        else:
            stop(arguments.folder.absolute())
    except SandboxError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
