"""Batches on their way to the trainer: proposed ``staleness`` (S) steps before they are learnt from.

    step            0        1     2     3         S = 1
    is proposed     0, 1     2     3     4         with the weights that the step begins with
    is learnt from  0        1     2     3

Which weights propose a batch is decided by its number, not by who is faster. So nothing is ever more than S updates
old, there are never more than S + 1 batches on their way, and a run with S > 0 can be repeated and resumed as one with
S = 0 can. Where the engine is not in the policy's way, proposing goes on in the background while the policy learns, and
judges get every part of a batch as soon as it is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_rlpt.buffer.codec import decode_group, encode_group
from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.observe import StageTimer, get_logger
from megatron_rlpt.trainer.candidates import CandidateGenerator
from megatron_rlpt.trainer.curriculum import Curriculum
from megatron_rlpt.trainer.judging import Judging
from megatron_rlpt.trainer.returned_groups import flaw_of
from megatron_rlpt.types import Group, without_stale

_log = get_logger(__name__)


class Pipeline:
    """What is done to batches before the update. Called by all ranks at the same time.

    Args:
        stream: where episodes come from.
        proposer: what makes groups of them.
        judging: where their outcomes come from.
        curriculum: how many rollouts they are offered.
        ranks: all ranks of the run.
        batch: episodes of a batch.
        part: episodes proposed at once; judges wait for a part, not for a batch.
        steps: batches of the run; None proposes ahead also of the last.
        staleness: S.
        background: propose in a thread of its own.
        timer: times what is proposed in the background.
        vocab: token ids of the policy are below this one.
    """

    def __init__(
        self,
        stream: EpisodeStream,
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
        self.stream = stream
        self.proposer = proposer
        self.judging = judging
        self.curriculum = curriculum
        self._ranks = ranks
        self._batch, self._part, self._steps, self._staleness = batch, part, steps, staleness
        self._proposed = 0
        """Batches proposed, or being proposed."""
        self._pool = ThreadPoolExecutor(1, "propose") if background else None
        self._timer = timer or StageTimer(None)
        self._work: Future[None] | None = None
        self._closed = threading.Event()
        self._restored: dict[int, Group] = {}
        self._anew = False
        """Whether the stream goes on otherwise than it did behind the checkpoint."""
        self._vocab = vocab

    def start(self, step: int) -> None:
        """Begin at ``step``, or go on there after ``load_state_dict``."""
        self.judging.start(step * self._batch, self._restored, self._anew)
        self._restored, self._anew = {}, False

    def propose(self, step: int, version: int) -> None:
        """Propose all batches up to ``staleness`` after that of ``step``; in the background it returns at once.

        Args:
            step: the step that begins.
            version: the policy version that the engine holds.
        """
        self.wait_for_generation()
        end = step + self._staleness + 1
        numbers = range(self._proposed, end if self._steps is None else min(end, self._steps))
        self._proposed = max(self._proposed, numbers.stop)
        # Now, not in the background: what is collected meanwhile must not change it.
        level = self.curriculum.level
        if self._pool is None:
            self._propose(numbers, level, version)
        else:
            self._work = self._pool.submit(self._propose_beside, numbers, level, version)

    def collect(self, step: int, version: int, stop: Callable[[], bool]) -> list[Group] | None:
        """The judged groups of ``step``, in the order of their episodes; waits for them.

        Args:
            step: the step that has begun.
            version: the policy version that is about to learn from them.
            stop: whether waiting is to be given up, asked on all ranks; then the answer is None, and what is on its
                way is kept in ``state_dict``.
        """
        while (groups := self.judging.collect(step * self._batch, self._batch, version)) is None:
            if stop():
                return None
            # What was to be judged may never come: then all ranks learn it from ``wait_for_generation``.
            if self._ranks.on_main(self._has_failed):
                self.wait_for_generation()
        groups = [without_stale(group, version, self._staleness) for group in groups]
        self.curriculum.observe(groups)
        return groups

    def wait_for_generation(self) -> None:
        """Wait until what is being proposed has been; only then may the engine's weights change.

        Raises:
            RlptError: proposing failed, on this rank or another.
        """
        if (work := self._work) is not None:
            self._work = None
            self._ranks.run_on_all_ranks(work.result, "the end of generation")

    def acknowledge(self, done: int) -> None:
        """A checkpoint after ``done`` steps has been published."""
        self.judging.acknowledge(done * self._batch)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on, JSON-serialisable; groups on their way included."""
        self.wait_for_generation()
        return {
            "stream": self.stream.state_dict(),
            "curriculum": self.curriculum.state_dict(),
            "proposed": self._proposed,
            "pending": {str(number): encode_group(group).hex() for number, group in self.judging.pending().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            CheckpointError: corpus, tokenizer or settings of the stream have changed.
            ValueError: a group on its way is not one that this run can learn from.
        """
        held_out = self.stream.load_state_dict(state["stream"])
        self.curriculum.load_state_dict(state["curriculum"])
        self._proposed = state["proposed"]
        self._restored = {
            int(number): decode_group(bytes.fromhex(text), f"group {number}")
            for number, text in state["pending"].items()
        }
        for number, group in self._restored.items():
            if flaw := flaw_of(group, self._vocab):
                raise ValueError(f"group {number} comes back {flaw}")
        if held_out is not None:
            self._anew = True
            if any(group.episode.id in held_out for group in self._restored.values()):
                # A batch is proposed as a whole.
                _log.warning("what was proposed ahead holds documents that are held out now, and is proposed anew",
                             episodes=len(self._restored))  # fmt: skip
                self._proposed = min(self._restored) // self._batch
                self._restored = {}

    def metrics(self) -> dict[str, float]:
        """What was read of the corpus so far; the same in every run once ``wait_for_generation`` has returned."""
        return self.stream.metrics()

    def close(self) -> None:
        """Propose nothing more; what is being proposed ends with its part. The buffer is let go of."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self.judging.close()

    def _propose_beside(self, numbers: range, level: int, version: int) -> None:
        with self._timer.background("generate"):
            self._propose(numbers, level, version)

    def _propose(self, numbers: range, level: int, version: int) -> None:
        for number in numbers:
            episodes = self.stream.take(self._batch)
            for start in range(0, self._batch, self._part):
                if self._closed.is_set():
                    return
                part = episodes[start : start + self._part]
                groups = self.proposer.propose(part, self.curriculum.rollouts(part, level), version)
                self.judging.submit(number * self._batch + start, groups)

    def _has_failed(self) -> bool:
        return self._work is not None and self._work.done() and self._work.exception() is not None
