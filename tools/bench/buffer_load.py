"""A trainer and workers that load a rollout buffer, for the chaos test and the benchmark.

    python tools/bench/buffer_load.py worker   --url URL --name NAME [--password-file FILE] --id ID --batch N
    python tools/bench/buffer_load.py trainer  --url URL --name NAME [--password-file FILE] --groups N --folder DIR ...

Groups and their results depend only on their numbers, so every process can check them. The trainer acts like a real
one: it puts groups with back-pressure, takes batches in order, and from time to time publishes a checkpoint and
acknowledges. After a kill it resumes from its checkpoint. ``DIR/log`` has one line for each group that was trained
on, in order.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.buffer.protocol import Pending, RolloutBuffer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source, derive_seed

IDLE = 0.02
"""Seconds between two polls for work or results."""


def make_group(number: int, rollouts: int = 1, tokens: int = 4) -> Group:
    """Return the group of a number: rollouts of the given size, and a prefix of twice as many tokens."""
    draw = random.Random(number)
    prefix = tuple(draw.randrange(50_000) for _ in range(2 * tokens))
    episode = Episode(f"{number:016x}", prefix, prefix[:tokens], "corpus", f"file:{number}", 2 * tokens)
    return Group(
        episode,
        tuple(
            Candidate(
                Source.ROLLOUT,
                tuple(draw.randrange(50_000) for _ in range(tokens)),
                policy_version=number // 64,
                seed=derive_seed(number, k),
                finish_reason="length",
                # As many bits as the fp32 of an engine.
                logprobs=tuple(-draw.getrandbits(24) / 2**21 for _ in range(tokens)),
            )
            for k in range(rollouts)
        ),
    )


def judge(group: Group, replies: int = 0, words: int = 0) -> Group:
    """Return the expected result of a group; its rewards hold ``replies`` replies of ``words`` words."""
    rewards = []
    for place, candidate in enumerate(group.candidates):
        value = derive_seed(group.episode.id, candidate.seed) / 2**63
        reasoning = " ".join(str(derive_seed(group.episode.id, place, n)) for n in range(words))
        detail = {"replies": [f"{reasoning} VERDICT: {n % 2 + 1}" for n in range(replies)]} if replies else {}
        rewards.append(Failed("odd", {}) if value < 0.05 else Reward(value, "judge", "v1", detail))
    return replace(group, rewards=tuple(rewards))


def result_line(number: int, group: Group | Failed) -> str:
    """Return the trainer's record of a group."""
    if isinstance(group, Failed):
        return f"{number} - {group.reason}\n"
    values = (repr(one.value) if isinstance(one, Reward) else one.reason for one in group.rewards)
    return f"{number} {group.episode.id} {' '.join(values)}\n"


def work(buffer: RolloutBuffer, worker: str, batch: int, lease: float, pause: float = 0.0) -> None:
    """Judge until killed.

    Args:
        buffer: holds the groups.
        worker: a unique name.
        batch: groups per claim.
        lease: seconds that a claim lasts.
        pause: longest seconds to judge a batch.
    """
    turn = 0
    while True:
        turn += 1
        works = buffer.claim(worker, batch, lease, f"{turn}-{os.urandom(4).hex()}")
        if not works:
            time.sleep(IDLE)
            continue
        time.sleep(random.random() * pause)
        for one in buffer.renew(works, lease):
            buffer.complete(one, judge(one.group))


def train(buffer: RolloutBuffer, groups: int, batch: int, ahead: int, every: int, folder: Path) -> None:
    """Train on all groups, starting at the checkpoint in ``folder``.

    Args:
        buffer: holds the groups.
        groups: number of groups.
        batch: groups per step.
        ahead: most groups to put beyond the next to take.
        every: steps between checkpoints.
        folder: of the checkpoint (``cursor``) and the log.
    """
    log, checkpoint = folder / "log", folder / "cursor"
    cursor, size = map(int, checkpoint.read_text().split()) if checkpoint.exists() else (0, 0)
    fencing_token = buffer.attach("load", cursor, capacity=ahead, max_attempts=1_000_000)
    put = cursor
    with log.open("a", encoding="utf-8") as lines:
        lines.truncate(size)
        for step, first in enumerate(range(cursor, groups, batch), start=1):
            count = min(batch, groups - first)
            while True:
                items = [(number, make_group(number)) for number in range(put, min(groups, first + ahead, put + batch))]
                put += buffer.put(fencing_token, items)
                taken = buffer.take(fencing_token, first, count)
                if not isinstance(taken, Pending):
                    break
                # The store lost its last second, or this trainer attached before it deleted groups.
                buffer.put(fencing_token, [(number, make_group(number)) for number in taken.missing if number < put])
                if not items:
                    time.sleep(IDLE)
            lines.writelines(result_line(first + place, group) for place, group in enumerate(taken))
            if step % every == 0 or first + count == groups:
                lines.flush()
                publish(checkpoint, f"{first + count} {log.stat().st_size}")
                buffer.acknowledge(fencing_token, first + count)


def publish(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="A trainer and workers that put load on a rollout buffer.")
    roles = parser.add_subparsers(dest="role", required=True)
    worker, trainer = roles.add_parser("worker"), roles.add_parser("trainer")
    for role in (worker, trainer):
        role.add_argument("--url", required=True)
        role.add_argument("--name", required=True)
        role.add_argument("--password-file", default="")
        role.add_argument("--batch", type=int, default=16)
    worker.add_argument("--id", required=True)
    worker.add_argument("--lease", type=float, default=5.0)
    worker.add_argument("--pause", type=float, default=0.0)
    trainer.add_argument("--groups", type=int, required=True)
    trainer.add_argument("--ahead", type=int, default=512)
    trainer.add_argument("--every", type=int, default=4)
    trainer.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    buffer = open_url(given.url, given.name, password_file=given.password_file, retry=60.0)
    if given.role == "worker":
        work(buffer, given.id, given.batch, given.lease, given.pause)
    else:
        train(buffer, given.groups, given.batch, given.ahead, given.every, given.folder)


if __name__ == "__main__":
    main()
