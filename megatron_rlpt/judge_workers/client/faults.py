"""Faults between a worker and a server: a small fixed set for counting; everything variable is detail."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from megatron_rlpt.plain_text import LONGEST_CAUSE, one_line, shortened
from megatron_rlpt.types import Failed

_LONGEST_TEXT = 500
"""Maximum characters of a server's message to keep."""


class Fault(enum.StrEnum):
    """Fault names, as used in ``Failed.reason``."""

    NO_SERVER = "no teacher server available"
    DEADLINE = "deadline exceeded"
    CONNECT = "connection failed"
    BROKEN = "connection broken"
    BUSY = "server busy"
    SERVER = "server error"
    DENIED = "access denied"
    NOT_FOUND = "model or address not found"
    REJECTED = "request rejected"
    STATUS = "unexpected status"
    NOT_JSON = "reply is not JSON"
    SHAPE = "reply of the wrong shape"
    TOO_LARGE = "reply too large"
    REFUSED = "refused"
    THOUGHT = "thought without an answer"
    NOT_FINITE = "log-probability is not finite"
    EMPTY = "empty prompt"


TRANSIENT = frozenset({Fault.CONNECT, Fault.BROKEN, Fault.BUSY, Fault.SERVER})
"""Worth a retry."""

PERMANENT = frozenset({Fault.DENIED, Fault.NOT_FOUND, Fault.REJECTED})
"""A retry cannot help; the request, the key or the server has to change."""

OF_SERVER = TRANSIENT | {Fault.DEADLINE, Fault.DENIED, Fault.NOT_FOUND, Fault.NOT_JSON, Fault.STATUS}
"""Faults of the server; the others are about one request and show that the server works."""


@dataclass(frozen=True)
class ServerProblem:
    """Why one exchange with a server failed."""

    fault: Fault
    detail: dict[str, Any] = field(default_factory=dict)
    """JSON-serialisable."""
    retry_after: float = 0.0
    """Seconds for which the server accepts no requests (Retry-After)."""

    @property
    def cause(self) -> str:
        """The server's message, shortened, with the HTTP status; empty if there is none."""
        message = str(self.detail.get("message") or self.detail.get("found") or self.detail.get("finish_reason") or "")
        status = self.detail.get("status")
        return shortened(f"{status}: {message}" if status else message, LONGEST_CAUSE)

    def failed(self, **more: Any) -> Failed:
        """Convert to a ``Failed`` with ``more`` detail."""
        cause = {"cause": self.cause} if self.cause else {}
        return Failed(self.fault.value, cause | self.detail | more)


def fault_of_status(status: int) -> Fault:
    """Return the fault for an HTTP status other than 200."""
    if status in (408, 409, 425, 429):
        return Fault.BUSY
    if status in (401, 403):
        return Fault.DENIED
    if status == 404:
        return Fault.NOT_FOUND
    if 400 <= status < 500:
        return Fault.REJECTED
    return Fault.SERVER if 500 <= status < 600 else Fault.STATUS


def excerpt(value: object) -> str:
    """Return ``value`` as one short line of text that is safe for terminals and files."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"deeply nested {type(value).__name__}"
    return one_line(text[: 2 * _LONGEST_TEXT])[:_LONGEST_TEXT]
