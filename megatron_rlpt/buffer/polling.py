"""How often to look into a store, which does not say by itself when something is there."""

from __future__ import annotations

_SHARE = 1 / 20
TRAINER_POLL = (0.02, 0.5)
"""Shortest and longest seconds between two looks of the trainer that waits for judged groups."""
WORKER_POLL = (0.02, 1.0)
"""Shortest and longest seconds between two claims of a judge worker that found nothing."""


def until_next_look(waited: float, shortest: float, longest: float) -> float:
    """Seconds to the next look, after ``waited`` seconds of waiting.

    A twentieth of the wait so far: what comes is seen at most 5 % late, and who waits for long asks seldom. Doubling
    the pause, as is usual after errors, would be as late as the wait was long.
    """
    return min(max(waited * _SHARE, shortest), longest)
