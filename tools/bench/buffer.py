"""Throughput of the rollout buffer: groups per second, with SQLite and with Redis.

    python tools/bench/buffer.py [--small 2000] [--realistic 200] [--repeats 3]

One process acts as trainer and worker in turn: it puts 64 groups per call, claims 16, completes one per call, takes 64.
Times include encoding and decoding. A realistic group has 16 rollouts of 128 tokens with
log-probabilities, and 4 replies of 60 words with every reward; a small group has one rollout of 4 tokens. Redis is
started by tools/sandbox/redis.py; both stores are in a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from buffer_load import judge, make_group

from megatron_rlpt.buffer.codec import encode_group
from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.buffer.protocol import ClaimedGroup, Pending, RolloutBuffer
from megatron_rlpt.types import Group

SANDBOX = Path(__file__).resolve().parents[1] / "sandbox/redis.py"
PUT, CLAIM = 64, 16
STEPS = ("put", "claim", "complete", "take", "all")


def measure(buffer: RolloutBuffer, groups: list[Group], results: list[Group]) -> dict[str, float]:
    """Return the seconds of every step over all groups."""
    count, items = len(groups), list(enumerate(groups))
    works: list[ClaimedGroup] = []
    seconds: dict[str, float] = {}
    fencing_token = buffer.attach("bench", 0, capacity=count, max_attempts=1)

    def timed(step: str, calls: Callable[[], None]) -> None:
        start = time.perf_counter()
        calls()
        seconds[step] = time.perf_counter() - start

    def put() -> None:
        for first in range(0, count, PUT):
            buffer.put(fencing_token, items[first : first + PUT])

    def claim() -> None:
        while claimed := buffer.claim("bench", CLAIM, 600.0, f"lease-{len(works)}"):
            works.extend(claimed)

    def complete() -> None:
        for work in works:
            assert buffer.complete(work, results[work.sequence])

    def take() -> None:
        for first in range(0, count, PUT):
            taken = buffer.take(fencing_token, first, min(PUT, count - first))
            assert not isinstance(taken, Pending)
            assert taken == results[first : first + PUT]

    for step, calls in (("put", put), ("claim", claim), ("complete", complete), ("take", take)):
        timed(step, calls)
    buffer.acknowledge(fencing_token, count)
    return {**seconds, "all": sum(seconds.values())}


def stores(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each store and the arguments of ``open_url`` for it."""
    yield "SQLite", {"url": f"sqlite:///{folder}/buffer.sqlite"}
    started = subprocess.run([sys.executable, SANDBOX, "start", folder / "redis"], capture_output=True, text=True)
    if started.returncode:
        sys.exit(started.stderr.strip())
    try:
        url, password_file = (part.split("=", 1)[1] for part in started.stdout.split())
        yield "Redis", {"url": url, "password_file": password_file}
    finally:
        subprocess.run([sys.executable, SANDBOX, "stop", folder / "redis"], check=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Groups per second through the rollout buffer.")
    parser.add_argument("--small", type=int, default=2000, help="small groups")
    parser.add_argument("--realistic", type=int, default=200, help="realistic groups")
    parser.add_argument("--repeats", type=int, default=3, help="repeats, of which the median is printed")
    given = parser.parse_args()
    sizes = {"small": (given.small, 1, 4, 0), "realistic": (given.realistic, 16, 128, 4)}
    figures: dict[tuple[str, str], dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for store, options in stores(Path(folder)):
            for size, (count, rollouts, tokens, replies) in sizes.items():
                groups = [make_group(number, rollouts, tokens) for number in range(count)]
                results = [judge(group, replies, words=60) for group in groups]
                rates = figures.setdefault((size, store), defaultdict(list))
                for repeat in range(given.repeats):
                    buffer = open_url(name=f"{size}-{repeat}", **options)
                    for step, seconds in measure(buffer, groups, results).items():
                        rates[step].append(count / seconds)
                    buffer.close()
                rates["KiB"] = [len(encode_group(results[0])) / 1024]
    print(f"{'groups/s':<20}" + "".join(f"{step:>10}" for step in STEPS) + f"{'KiB/group':>12}")
    for (size, store), rates in sorted(figures.items()):
        cells = "".join(f"{statistics.median(rates[step]):>10.0f}" for step in STEPS)
        print(f"{size + ', ' + store:<20}{cells}{rates['KiB'][0]:>12.1f}")


if __name__ == "__main__":
    main()
