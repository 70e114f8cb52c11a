"""How often to write checkpoints: often enough that a failure costs little, seldom enough that writing does not."""

from __future__ import annotations

import math


def optimal_checkpoint_interval(cost: float, between_failures: float) -> float:
    """Seconds of work between two checkpoints that make the expected time of a run least.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006), equation 37; its first term is J. W. Young, "A first order approximation to the optimum
    checkpoint interval", Communications of the ACM 17 (1974). Failures come at random at a constant rate; how long a
    restart takes makes no difference.

    Args:
        cost: seconds that a checkpoint holds up the run.
        between_failures: mean seconds between two failures of the run; infinite where nothing fails.

    Returns:
        Infinity where nothing fails.
    """
    if cost >= 2 * between_failures:
        return between_failures
    ratio = cost / (2 * between_failures)
    return math.sqrt(2 * cost * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost
