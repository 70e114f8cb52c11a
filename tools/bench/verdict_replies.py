"""Accuracy of the reply parser on 50,000 generated replies of a judge: honest ones accepted, hostile ones refused.

    python tools/bench/verdict_replies.py [replies]

Exits with 1 when a verdict is invented, an exception is raised or fewer than 0.99 of the honest replies are accepted.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "unit" / "teacher"))
from verdict_replies import HONEST, HOSTILE, make

from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.verdicts.parsing import (
    FACTUALITY,
    QUALITY,
    SAFETY,
    parse_factuality,
    parse_quality,
    parse_safety,
)
from megatron_rlpt.types import Failed

PARSE = {"quality": parse_quality, "safety": parse_safety, "factuality": parse_factuality}
MEANING: dict[str, Mapping[str, float]] = {
    "quality": {word: index for index, word in enumerate(QUALITY)},
    "safety": SAFETY,
    "factuality": FACTUALITY,
}


def main(count: int) -> int:
    """Print a table by form; return 1 if the parser misreads too many replies."""
    made: Counter[tuple[str, bool]] = Counter()
    accepted: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    slowest = 0.0
    for seed in range(count):
        axis, form, text, word = make(seed)
        made[form, word is not None] += 1
        began = time.process_time()
        reward = PARSE[axis](Reply(text, (), "stop"))
        slowest = max(slowest, time.process_time() - began)
        if isinstance(reward, Failed):
            continue
        if word is not None and reward == MEANING[axis][word]:
            accepted[form] += 1
        else:
            wrong[form] += 1
            print(f"seed {seed}, {form}: {reward} out of {text!r}", file=sys.stderr)
    for form in HONEST:
        print(f"{form:<32}{made[form, True]:>7} honest {accepted[form] / max(1, made[form, True]):>8.4f} accepted")
    for form in HOSTILE:
        print(f"{form:<32}{made[form, False]:>7} hostile {wrong[form]:>5} invented")
    honest = sum(number for (_, is_honest), number in made.items() if is_honest)
    share = accepted.total() / max(1, honest)
    print(
        f"\n{count} replies: {share:.4f} of {honest} honest ones accepted, {wrong.total()} verdicts invented; ", end=""
    )
    print(f"slowest {slowest * 1000:.1f} ms")
    return int(bool(wrong) or share < 0.99)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000))
