"""What sinks of metrics are handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """The metrics of one step."""

    step: int
    version: int
    """Policy version after the step: number of optimizer updates."""
    time: float
    """Seconds since the Unix epoch."""
    metrics: Mapping[str, float]
