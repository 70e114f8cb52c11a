"""A real Redis server for tests, started by tools/sandbox/redis.py."""

from __future__ import annotations

import json
import os
import select
import signal
from pathlib import Path

import redis
from sandbox_script import call

SCRIPT = Path(__file__).resolve().parents[1] / "tools/sandbox/redis.py"


class RedisServer:
    """A server in its own folder, with ``url`` and ``password_file`` once it has started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> RedisServer:
        code, out, err = call(SCRIPT, "start", self.folder)
        assert code == 0, err
        values = dict(override.split("=", 1) for override in out.split())
        self.url, self.password_file = values["buffer.url"], values["buffer.password_file"]
        return self

    @property
    def password(self) -> str:
        return Path(self.password_file).read_text()

    @property
    def options(self) -> dict[str, str]:
        return {"url": self.url, "password_file": self.password_file}

    def kill(self) -> None:
        """Kill it; return once it has ended and its port is free. What it has confirmed is in its append-only file."""
        # It writes a confirmed change up to two seconds late while the disk is busy.
        with redis.Redis.from_url(self.url, password=self.password) as client:
            client.config_set("appendfsync", "always")
        ((number, _),) = json.loads((self.folder / "processes.json").read_text()).values()
        ended = os.pidfd_open(number)
        try:
            os.kill(number, signal.SIGKILL)
            select.select([ended], [], [])
        finally:
            os.close(ended)

    def stop(self) -> None:
        code, _, err = call(SCRIPT, "stop", self.folder)
        assert code == 0, err

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *unused: object) -> None:
        self.stop()
