"""The circuit breaker of one server: after several failures in a row, only probes are sent until one succeeds.

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
"""Maximum seconds between probes of a server that stays down; a probe costs only one connection."""


class State(enum.StrEnum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Starts half open, so a server gets no requests before it has answered a probe. Has no clock; the caller waits."""

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
        """True if requests may be sent."""
        return self.state == State.CLOSED

    def succeeded(self) -> None:
        """Record an answered request. It does not close an open breaker; only a probe does."""
        self._failures = 0

    def failed(self) -> bool:
        """Record a failed request; return True if that opened the breaker."""
        self._failures += 1
        if not self.closed or self._failures < self._limit:
            return False
        self.state = State.OPEN
        return True

    def cooldown(self) -> float:
        """Return seconds until the next probe; random, so that workers do not probe simultaneously."""
        return self._backoff.delay(self._failed_probes + 1)

    def begin_probe(self) -> None:
        """Enter the half-open state for one probe after the cool-down."""
        self.state = State.HALF_OPEN

    def finish_probe(self, success: bool) -> None:
        """Record the result of a probe."""
        if success:
            self.state, self._failures, self._failed_probes = State.CLOSED, 0, 0
        else:
            self.state, self._failed_probes = State.OPEN, self._failed_probes + 1
