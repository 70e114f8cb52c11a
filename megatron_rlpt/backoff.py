"""Delays between attempts: the one back-off rule of the repository."""

from __future__ import annotations

import random
from dataclasses import dataclass

_LARGEST_EXPONENT = 60


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off: delays double from ``first`` to ``longest`` seconds."""

    first: float
    longest: float
    jitter: float = 0.0
    """Random share of each delay: 0 is exact, 0.5 draws from the upper half, 1 from the whole range."""

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after ``failures`` failures in a row (at least 1)."""
        delay = min(self.longest, self.first * 2.0 ** min(failures - 1, _LARGEST_EXPONENT))
        return delay * random.uniform(1.0 - self.jitter, 1.0) if self.jitter else delay
