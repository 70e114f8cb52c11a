"""Identifies the process that holds an exclusive resource, and detects that it has ended.

A process on another machine, or in a container with a separate process namespace, cannot be inspected: it counts as
alive as long as it renews its hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """Identifies one process, also against a later one with the same number; ``token`` differs for every holder."""

    host: str
    pid: int
    machine: str
    """Boot id of the machine and its process namespace."""
    started: str
    """Start time of the process, as the kernel reports it."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def me(cls) -> Holder:
        """Return a holder for this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _machine(), _started(pid) or "")

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Parse the result of ``str``; return None for any other text."""
        try:
            fields = json.loads(text)
            holder = cls(**fields)
        except (ValueError, TypeError, RecursionError):
            return None
        known = type(holder.pid) is int and all(
            isinstance(value, str) for name, value in fields.items() if name != "pid"
        )
        return holder if known else None

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    def describe(self) -> str:
        """Return a text for messages: ``process 4711 on node17``."""
        return f"process {self.pid} on {self.host}"

    def is_alive(self) -> bool | None:
        """Return whether the process runs; None if it cannot be inspected from here."""
        if not self.machine or self.machine != _machine():
            return None
        started = _started(self.pid)
        return started is not None and started == self.started


def _machine() -> str:
    """Return boot id and process namespace; empty where the system does not provide them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return the start time of the process; None if it does not exist or is a zombie."""
    with contextlib.suppress(OSError):
        # Skip the process name in parentheses, which may contain any character.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
