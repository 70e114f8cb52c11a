"""Which process holds something that only one may hold, and whether it is known to have ended.

A process of another machine, or of a container with process numbers of its own, cannot be looked at: it counts as
alive for as long as it renews what it holds.
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
    """A process, told apart from all others: also from a later one with its number, and from itself earlier on."""

    host: str
    pid: int
    machine: str
    """Which boot of which machine, and whose process numbers these are."""
    started: str
    """When the process started, as the kernel says it."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _machine(), _started(pid) or "")

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """What ``str`` wrote; None if it is something else."""
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
        """For a message: ``process 4711 on node17``."""
        return f"process {self.pid} on {self.host}"

    def is_alive(self) -> bool | None:
        """Whether it runs; None where that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        started = _started(self.pid)
        return started is not None and started == self.started


def _machine() -> str:
    """Empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When the process of this number started; None without one, or where it has ended and is only not reaped yet."""
    with contextlib.suppress(OSError):
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
