"""What the sandboxes have in common: Debian's packages, and daemons that belong to a folder and to nobody else.

The numbers of a folder's daemons lie in ``processes.json`` beside their start times, because a number is given anew
once its process has ended: only a process that fits both is ever signalled. Only Python's standard library is used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SECONDS = 120.0
"""How long daemons may take to start or to end; seconds are usual, a busy machine needs more."""
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
"""Debian leaves the folders of daemons out of an ordinary user's PATH."""


class SandboxError(Exception):
    """What a user can put right, in one line."""


def install_packages(title: str, programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install Debian's ``packages`` unless all ``programs`` are there; ``title`` is what they make up.

    Raises:
        SandboxError: no apt-get, not root, or apt-get failed.
    """
    if not missing(programs):
        return
    what = f"{title} is not installed here ({', '.join(missing(programs))} not found)"
    if shutil.which("apt-get") is None:
        raise SandboxError(f"{what} and there is no apt-get; install {' and '.join(packages)} in this system's way")
    if os.geteuid() != 0:
        raise SandboxError(f"{what}; run as root: apt-get install {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            reason = last_line(done.stderr) or last_line(done.stdout)
            raise SandboxError(f"apt-get {arguments[0]} failed with {done.returncode}: {reason}")
    if missing(programs):
        raise SandboxError(f"{' and '.join(packages)} of this system lack {', '.join(missing(programs))}")


def require_installed(title: str, programs: Sequence[str]) -> None:
    """Raises SandboxError: not all of ``programs`` are there."""
    if missing(programs):
        raise SandboxError(
            f"{title} is not installed here ({', '.join(missing(programs))} not found); run as root: "
            f"python3 {sys.argv[0]} install"
        )


def missing(programs: Sequence[str]) -> list[str]:
    """Those of ``programs`` that are not installed."""
    return [name for name in programs if shutil.which(name, path=SEARCH_PATH) is None]


def require_free(folder: Path, marker: str) -> None:
    """Raises SandboxError: ``folder`` holds something else than a sandbox (which has ``marker``), or a running one."""
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise SandboxError(f"{folder} is not empty and no sandbox; name a new folder")
    if any(is_running(*process) for process in read_processes(folder).values()):
        raise SandboxError(f"{folder} is running already; stop it with: python3 {sys.argv[0]} stop {folder}")


def prepare(folder: Path, inside: Sequence[str]) -> None:
    """Make ``folder`` for its owner alone, and the folders ``inside`` it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in inside:
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "processes.json").unlink(missing_ok=True)  # of a sandbox that did not end in order


def write_secret(path: Path, secret: bytes) -> None:
    """Write a file that is readable by its owner alone from the first moment."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
        handle.write(secret)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def launch(
    folder: Path,
    program: str,
    *arguments: str,
    name: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start a daemon that outlives this process, and note its number and start time; its output is in ``log/``."""
    name = name or program
    executable = shutil.which(program, path=SEARCH_PATH)
    assert executable is not None, program
    with (folder / f"log/{name}.out").open("wb") as output:
        process = subprocess.Popen(
            [executable, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    processes = read_processes(folder) | {name: (process.pid, start_time(process.pid))}
    (folder / "processes.json").write_text(json.dumps(processes))


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


def require_sandbox(folder: Path, marker: str) -> None:
    """Raises SandboxError: ``folder`` holds no sandbox, which has ``marker``."""
    if not (folder / marker).is_file():
        raise SandboxError(f"{folder} holds no sandbox")


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


def command_line(
    description: str,
    helps: tuple[str, str, str],
    install: Callable[[], None],
    start: Callable[[Path], str],
    stop: Callable[[Path], None],
) -> None:
    """The commands of a sandbox: ``install``, ``start DIR`` and ``stop DIR``; exit code 1 with one line on a failure.

    Args:
        description: what the sandbox is.
        helps: what ``install``, ``start`` and ``stop`` do.
        install: installs packages.
        start: starts the sandbox in a folder; what it returns is printed.
        stop: ends the sandbox of a folder.
    """
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help=helps[0])
    for command, text in zip(("start", "stop"), helps[1:], strict=True):
        commands.add_parser(command, help=text).add_argument("folder", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    try:
        if arguments.command == "install":
            install()
        elif arguments.command == "start":
            print(start(arguments.folder.absolute()))
        else:
            stop(arguments.folder.absolute())
    except SandboxError as error:
        sys.exit(f"error: {error}")
