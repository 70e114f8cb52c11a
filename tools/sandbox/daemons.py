"""Common parts of the sandboxes: installing Debian packages, and daemons that belong to a folder.

``processes.json`` holds process IDs and start times of a folder's daemons. Process IDs are reused, so only a process
that matches both is ever signaled. Only Python's standard library is used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SECONDS = 120.0
"""Seconds for daemons to start or end; a busy machine needs many."""
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
"""PATH with the folders of daemons, which Debian omits for ordinary users."""


class SandboxError(Exception):
    """An error that the user can fix, in one line."""


def install_packages(title: str, programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install Debian's ``packages`` unless all ``programs`` exist; ``title`` names them in errors.

    Raises:
        SandboxError: no apt-get, not root, or apt-get failed.
    """
    if not missing(programs):
        return
    what = f"{title} is not installed here ({', '.join(missing(programs))} not found)"
    if shutil.which("apt-get") is None:
        raise SandboxError(f"{what} and there is no apt-get; install {' and '.join(packages)} another way")
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
    """Raise SandboxError unless all ``programs`` exist."""
    if missing(programs):
        raise SandboxError(
            f"{title} is not installed here ({', '.join(missing(programs))} not found); run as root: "
            f"python3 {sys.argv[0]} install"
        )


def missing(programs: Sequence[str]) -> list[str]:
    """Return those of ``programs`` that are not installed."""
    return [name for name in programs if shutil.which(name, path=SEARCH_PATH) is None]


def require_free(folder: Path, marker: str) -> None:
    """Raise SandboxError if ``folder`` holds a running sandbox, or other files (a sandbox has ``marker``)."""
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise SandboxError(f"{folder} is not empty and no sandbox; name a new folder")
    if any(is_running(*process) for process in read_processes(folder).values()):
        raise SandboxError(f"{folder} is running already; stop it with: python3 {sys.argv[0]} stop {folder}")


def prepare(folder: Path, inside: Sequence[str]) -> None:
    """Create ``folder`` with mode 0700, and the folders ``inside`` it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in inside:
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "processes.json").unlink(missing_ok=True)  # left by a sandbox that did not stop cleanly


def write_secret(path: Path, secret: bytes) -> None:
    """Write a file that only its owner can ever read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
        handle.write(secret)


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that are currently free, if possible none that Linux gives to connections."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    lasting = [*range(10_000, first), *range(max(last + 1, 10_000), 65_536)]
    random.SystemRandom().shuffle(lasting)
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in [*lasting, *[0] * count]:
            if len(ports) == count:
                break
            with contextlib.suppress(OSError):
                ports.append(held.enter_context(socket.create_server(("127.0.0.1", port))).getsockname()[1])
    return ports


def launch(
    folder: Path,
    program: str,
    *arguments: str,
    name: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start a daemon that outlives this process, and record it; its output goes to ``log/``."""
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
        SandboxError: a daemon ended, or it took too long.
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
    """Raise SandboxError unless ``folder`` holds a sandbox, which has ``marker``."""
    if not (folder / marker).is_file():
        raise SandboxError(f"{folder} holds no sandbox")


def end_daemons(folder: Path) -> None:
    """End the daemons of ``folder`` in reverse order of their start.

    Raises:
        SandboxError: one did not end, even when killed.
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
    """Return process ID and start time of the daemons of ``folder``, in the order of their start."""
    path = folder / "processes.json"
    if not path.is_file():
        return {}
    return {name: (int(number), str(started)) for name, (number, started) in json.loads(path.read_text()).items()}


def is_running(number: int, started: str) -> bool:
    """Return whether the process with this ID and start time is running."""
    return bool(started) and start_time(number) == started


def start_time(number: int) -> str:
    """Return the start time of a process in clock ticks since boot; empty if it has ended (proc(5))."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def last_line(text: str) -> str:
    """Return the last line of ``text`` that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def command_line(
    description: str,
    helps: tuple[str, str, str],
    install: Callable[[], None],
    start: Callable[[Path], str],
    stop: Callable[[Path], None],
) -> None:
    """Run the command line of a sandbox: ``install``, ``start DIR`` and ``stop DIR``; exit with 1 on failure.

    Args:
        description: of the sandbox.
        helps: descriptions of ``install``, ``start`` and ``stop``.
        install: installs packages.
        start: starts the sandbox in a folder; its result is printed.
        stop: stops the sandbox of a folder.
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
