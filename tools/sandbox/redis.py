"""A real Redis server in a folder, to try a run with its rollout buffer in Redis.

    sudo python3 tools/sandbox/redis.py install   # Debian's package redis-server, if missing
    python3 tools/sandbox/redis.py start DIR      # returns once the server answers
    rlpt train -c my.yaml buffer.url=... buffer.password_file=...    # ``start`` prints these two
    python3 tools/sandbox/redis.py stop DIR       # stops the server; its data stays in DIR

DIR (mode 0700) holds everything: configuration, password, append-only file (``data/``), log (``log/``), process ID
(``processes.json``). The server listens on this machine only, on a port that is chosen once. Started again, even after
a kill, it has its data. Other Redis servers and processes are not affected; Debian's package also installs a system
service, which the sandbox neither needs nor touches.

The settings are those that a rollout buffer needs: nothing is evicted, and every change is in the append-only file,
which reaches the disk once a second. A power failure, or a kill while the disk is busy, may lose the last seconds but
no group: the trainer puts missing groups again, and workers judge them again.

Only Python's standard library is used. Exit codes: 0 done, 1 with one line on standard error.
"""

from __future__ import annotations

import re
import secrets
import socket
from pathlib import Path

from daemons import (
    SandboxError,
    command_line,
    end_daemons,
    free_ports,
    install_packages,
    launch,
    prepare,
    require_free,
    require_installed,
    require_sandbox,
    wait_for,
    write_secret,
)

PROGRAMS = ("redis-server",)

CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}/data"
daemonize no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


def install() -> None:
    """Install the Debian package."""
    install_packages("Redis", PROGRAMS, ["redis-server"])


def start(folder: Path) -> None:
    """Start the server in ``folder``, which is created if missing, and wait until it answers.

    Raises:
        SandboxError: Redis is not installed, ``folder`` cannot be used or is in use, or the server did not start,
            in which case it is stopped.
    """
    require_installed("Redis", PROGRAMS)
    if re.search(r"[\s\"\\]", str(folder)):
        raise SandboxError(f"{folder} has a space, a quote or a backslash in its path; use another")
    require_free(folder, "redis.conf")
    prepare(folder, ("data", "log"))
    if not (folder / "redis.conf").is_file():
        password = secrets.token_hex(16)
        write_secret(folder / "password", password.encode())
        text = CONFIGURATION.format(port=free_ports(1)[0], password=password, folder=folder)
        write_secret(folder / "redis.conf", text.encode())
    try:
        launch(folder, "redis-server", str(folder / "redis.conf"))
        wait_for(folder, "answer from redis-server", lambda: answers(folder))
    except BaseException:
        end_daemons(folder)
        raise


def stop(folder: Path) -> None:
    """Stop the server of ``folder``; its data and log stay.

    Raises:
        SandboxError: there is no sandbox in ``folder``, or the server did not end.
    """
    require_sandbox(folder, "redis.conf")
    end_daemons(folder)


def port_of(folder: Path) -> int:
    """Return the port of the server of ``folder``."""
    found = re.search(r"^port (\d+)$", (folder / "redis.conf").read_text(), re.MULTILINE)
    if found is None:
        raise SandboxError(f"{folder}/redis.conf has no port; remove {folder} and start again")
    return int(found.group(1))


def answers(folder: Path) -> bool:
    """Return whether the server has loaded its append-only file and accepts commands."""
    password = (folder / "password").read_text()
    try:
        with socket.create_connection(("127.0.0.1", port_of(folder)), timeout=1) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            reply = b""
            while reply.count(b"\n") < 2 and (part := connection.recv(1024)):
                reply += part
    except OSError:
        return False
    # While it loads its file it answers -LOADING.
    return reply == b"+OK\r\n+PONG\r\n"


def overrides(folder: Path) -> str:
    """Return the overrides for a run that uses the server."""
    return f"buffer.url=redis://127.0.0.1:{port_of(folder)}/0 buffer.password_file={folder}/password"


def main() -> None:
    """Entry point of the script."""

    def started(folder: Path) -> str:
        start(folder)
        return overrides(folder)

    helps = (
        "install Debian's package if missing (root)",
        "start it and wait until it answers",
        "stop it; its data stays",
    )
    command_line("A real Redis server in a folder.", helps, install, started, stop)


if __name__ == "__main__":
    main()
