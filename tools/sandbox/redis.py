"""A real Redis server of its own folder, to try a run whose rollout buffer is in Redis.

    sudo python3 tools/sandbox/redis.py install   # Debian's package redis-server, unless it is there
    python3 tools/sandbox/redis.py start DIR      # returns once the server answers
    rlpt train -c my.yaml buffer.url=... buffer.password_file=...    # ``start`` prints these two
    python3 tools/sandbox/redis.py stop DIR       # ends the server; what it holds stays in DIR

All that belongs to it lies in DIR, which is made readable by its owner alone: configuration, password, append-only
file (``data/``), log (``log/``), the number of its process (``processes.json``). The server listens on this machine
only, on a port that was free when DIR was made and stays the same: started again, also after it was killed, the server
goes on with what it held. A Redis that runs on the machine for real is left alone, as are all processes that were not
started here. Debian's package brings a service of the system too; the sandbox neither needs nor touches it.

It is set up as a rollout buffer wants it: nothing is evicted, and every change is in the append-only file before it is
answered. The file reaches the disk once a second, so a power failure may cost the last second, and that no group: the
buffer is asked for what is missing, and it is put or judged once more.

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
    """See ``install_packages``."""
    install_packages("Redis", PROGRAMS, ["redis-server"])


def start(folder: Path) -> None:
    """Start the server in ``folder``, which is made unless it is there, and wait until it answers.

    Raises:
        SandboxError: Redis is not installed, ``folder`` cannot be used or is in use, or the server did not come up;
            it is ended again then.
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
    """End the server of ``folder``; what it holds and its log stay.

    Raises:
        SandboxError: there is no sandbox in ``folder``, or the server did not end.
    """
    require_sandbox(folder, "redis.conf")
    end_daemons(folder)


def port_of(folder: Path) -> int:
    """Port of the server of ``folder``."""
    found = re.search(r"^port (\d+)$", (folder / "redis.conf").read_text(), re.MULTILINE)
    if found is None:
        raise SandboxError(f"{folder}/redis.conf names no port; remove {folder} and start anew")
    return int(found.group(1))


def answers(folder: Path) -> bool:
    """Whether the server has read its append-only file and takes commands."""
    password = (folder / "password").read_text()
    try:
        with socket.create_connection(("127.0.0.1", port_of(folder)), timeout=1) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            reply = b""
            while reply.count(b"\n") < 2 and (part := connection.recv(1024)):
                reply += part
    except OSError:
        return False
    # While it reads its file it answers -LOADING.
    return reply == b"+OK\r\n+PONG\r\n"


def overrides(folder: Path) -> str:
    """What a run in this server sets."""
    return f"buffer.url=redis://127.0.0.1:{port_of(folder)}/0 buffer.password_file={folder}/password"


def main() -> None:
    """Entry point of the script."""

    def started(folder: Path) -> str:
        start(folder)
        return overrides(folder)

    helps = (
        "install Debian's package unless it is there (root)",
        "start it and wait until it answers",
        "end it; what it holds stays",
    )
    command_line("A real Redis server of its own folder.", helps, install, started, stop)


if __name__ == "__main__":
    main()
