"""From episodes to judged batches: each batch is proposed ``staleness`` (S) steps before the policy learns from it.

    step            0        1     2     3         S = 1
    propose batch   0, 1     2     3     4         with the weights at the start of the step
    learn from      0        1     2     3

The number of a batch decides which weights propose it, not timing. So no rollout is more than S updates old, at most
S + 1 batches are in flight, and a run with S > 0 is as reproducible and resumable as one with S = 0. If the engine can
generate while the policy trains, proposing runs in the background, and judges get every part of a batch as soon as it
is generated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_rlpt.buffer.codec import decode_group, encode_group
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.observe import StageTimer, get_logger
from megatron_rlpt.trainer.candidates import CandidateGenerator
from megatron_rlpt.trainer.curriculum import Curriculum
from megatron_rlpt.trainer.episode_feed import EpisodeFeed
from megatron_rlpt.trainer.judging import Judging
from megatron_rlpt.trainer.returned_groups import flaw_of
from megatron_rlpt.types import Group, without_stale

_log = get_logger(__name__)


class Pipeline:
    """Produces the judged batches. All ranks call its methods together.

    Args:
        feed: yields episodes.
        proposer: turns episodes into groups of candidates.
        judging: judges groups.
        curriculum: decides the number of rollouts per episode.
        ranks: all ranks of the run.
        batch: episodes per batch.
        part: episodes to propose and submit together; a part of a batch.
        steps: number of batches of the run; None proposes ahead beyond the last one.
        staleness: S.
        background: propose in a background thread.
        timer: times proposing in the background.
        vocab: vocabulary size of the policy.
    """

    def __init__(
        self,
        feed: EpisodeFeed,
        proposer: CandidateGenerator,
        judging: Judging,
        curriculum: Curriculum,
        ranks: Ranks,
        *,
        batch: int,
        part: int,
        steps: int | None,
        staleness: int,
        background: bool,
        timer: StageTimer | None = None,
        vocab: int = 1 << 31,
    ) -> None:
        self.feed = feed
        self.proposer = proposer
        self.judging = judging
        self.curriculum = curriculum
        self._ranks = ranks
        self._batch, self._part, self._steps, self._staleness = batch, part, steps, staleness
        self._proposed = 0
        """Number of batches proposed so far, including those in progress."""
        self._pool = ThreadPoolExecutor(1, "propose") if background else None
        self._timer = timer or StageTimer(None)
        self._work: Future[None] | None = None
        self._closed = threading.Event()
        self._restored: dict[int, Group] = {}
        self._held_out: frozenset[str] | None = None
        """Ids of restored episodes that are now held out, on rank 0; None if the held-out documents are the same."""
        self._vocab = vocab

    def start(self, step: int) -> None:
        """Start at ``step``; call it after ``load_state_dict`` to resume."""
        held_out = self._ranks.broadcast(self._held_out)
        if held_out is not None and any(group.episode.id in held_out for group in self._restored.values()):
            # Proposing works on whole batches, so repeat all of them.
            _log.warning(
                "proposing batches again because they hold documents that are now held out",
                episodes=len(self._restored),
            )
            self._proposed = min(self._restored) // self._batch
            self._restored = {}
        # With other held-out documents the stream yields other episodes than before the checkpoint.
        self.judging.start(step * self._batch, self._restored, held_out is not None)
        self._restored, self._held_out = {}, None

    def propose(self, step: int, version: int) -> None:
        """Propose all batches up to number ``step + staleness``; in the background, return immediately.

        Args:
            step: the step that begins.
            version: policy version of the engine's weights.
        """
        self.wait_for_generation()
        end = step + self._staleness + 1
        numbers = range(self._proposed, end if self._steps is None else min(end, self._steps))
        self._proposed = max(self._proposed, numbers.stop)
        # Read the level now: batches collected while the background thread works must not change it.
        level = self.curriculum.level
        if self._pool is None:
            self._propose(numbers, level, version)
        else:
            self._work = self._pool.submit(self._propose_in_background, numbers, level, version)

    def collect(self, step: int, version: int, stop: Callable[[], bool]) -> list[Group] | None:
        """Wait for the judged groups of ``step`` and return them in the order of their episodes.

        Args:
            step: the step that has begun.
            version: version of the policy that will learn from them.
            stop: returns whether to give up waiting, a collective. ``collect`` then returns None, and ``state_dict``
                keeps the submitted groups.
        """
        while (groups := self.judging.collect(step * self._batch, self._batch, version)) is None:
            if stop():
                return None
            # If proposing has failed, these groups never come; ``wait_for_generation`` raises its error on all ranks.
            if self._ranks.on_main(self._has_failed):
                self.wait_for_generation()
        groups = [without_stale(group, version, self._staleness) for group in groups]
        self.curriculum.observe(groups)
        return groups

    def wait_for_generation(self) -> None:
        """Wait for proposing in the background; the engine's weights must not change before.

        Raises:
            RlptError: proposing failed, on this rank or another.
        """
        if (work := self._work) is not None:
            self._work = None
            self._ranks.run_on_all_ranks(work.result, "the end of generation")

    def acknowledge(self, done: int) -> None:
        """Release groups whose updates are in the published checkpoint after ``done`` steps."""
        self.judging.acknowledge(done * self._batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, submitted groups included, JSON-serializable."""
        self.wait_for_generation()
        return {
            "stream": self.feed.state_dict(),
            "curriculum": self.curriculum.state_dict(),
            "proposed": self._proposed,
            "pending": {str(number): encode_group(group).hex() for number, group in self.judging.pending().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a ``state_dict``.

        Raises:
            CheckpointError: corpus, tokenizer or settings of the stream have changed.
            ValueError: this run cannot learn from one of the groups.
        """
        self._held_out = self.feed.load_state_dict(state["stream"])
        self.curriculum.load_state_dict(state["curriculum"])
        self._proposed = state["proposed"]
        self._restored = {
            int(number): decode_group(bytes.fromhex(text), f"group {number}")
            for number, text in state["pending"].items()
        }
        for number, group in self._restored.items():
            if flaw := flaw_of(group, self._vocab):
                raise ValueError(f"group {number} comes back {flaw}")

    def metrics(self) -> dict[str, float]:
        """Return how much of the corpus was read; deterministic after ``wait_for_generation``."""
        return self.feed.metrics()

    def close(self) -> None:
        """Stop proposing after the current part, and close the judging."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self.feed.close()
        self.judging.close()

    def _propose_in_background(self, numbers: range, level: int, version: int) -> None:
        with self._timer.background("generate"):
            self._propose(numbers, level, version)

    def _propose(self, numbers: range, level: int, version: int) -> None:
        for number in numbers:
            episodes = self.feed.take()
            for start in range(0, self._batch, self._part):
                if self._closed.is_set():
                    return
                part = episodes[start : start + self._part]
                groups = self.proposer.propose(part, self.curriculum.rollouts(part, level), version)
                self.judging.submit(number * self._batch + start, groups)

    def _has_failed(self) -> bool:
        return self._work is not None and self._work.done() and self._work.exception() is not None
