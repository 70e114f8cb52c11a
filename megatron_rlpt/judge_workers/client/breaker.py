"""The circuit breaker of one server: after several failures in a row nothing but a probe is sent, until one succeeds.

closed ── failures in a row ──> open ── cool-down over ──> half open ── probe succeeds ──> closed
                                 ^                             │
                                 └── longer cool-down ── fails ┘
"""

from __future__ import annotations

import enum

from megatron_rlpt.backoff import Backoff

FAILURES = 5
"""Failures in a row that open a breaker."""
FIRST_COOLDOWN = 1.0
"""Seconds before the first probe."""
LONGEST_COOLDOWN = 15.0
"""Seconds between probes of a server that stays down; a probe costs it one connection, so they need not be rare."""


class State(enum.StrEnum):
    """Of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Starts half open: nothing is sent to a server that has not answered once. Knows no clock; the caller waits."""

    def __init__(
        self, failures: int = FAILURES, first: float = FIRST_COOLDOWN, longest: float = LONGEST_COOLDOWN
    ) -> None:
        self._limit = failures
        self._backoff = Backoff(first, longest, jitter=0.5)
        self._failures = 0
        self._failed_probes = 0
        self.state = State.HALF_OPEN

    @property
    def closed(self) -> bool:
        """Whether requests may be sent."""
        return self.state == State.CLOSED

    def succeeded(self) -> None:
        """A request was answered. Of an open breaker that is an old request: only a probe closes it."""
        self._failures = 0

    def failed(self) -> bool:
        """A request failed; whether that opened the breaker."""
        self._failures += 1
        if not self.closed or self._failures < self._limit:
            return False
        self.state = State.OPEN
        return True

    def cooldown(self) -> float:
        """Seconds to wait before the next probe: doubling, and random so that workers do not probe all at once."""
        return self._backoff.delay(self._failed_probes + 1)

    def begin_probe(self) -> None:
        """The cool-down is over, one probe is sent."""
        self.state = State.HALF_OPEN

    def finish_probe(self, success: bool) -> None:
        """What came of the probe."""
        if success:
            self.state, self._failures, self._failed_probes = State.CLOSED, 0, 0
        else:
            self.state, self._failed_probes = State.OPEN, self._failed_probes + 1
