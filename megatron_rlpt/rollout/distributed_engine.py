"""The engines of several ranks behind the protocol of one engine.

    ranks with an engine   generate their share of the prompts, load weights
    all ranks              request the same prompts, get every continuation, iterate over the weights

Several ranks may share an engine (``placement.py``): they generate the same share, and the first of them gives the
answers. A rank that fails tells the others, so that all ranks stop with the same error instead of waiting for a rank
that has ended.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from megatron_rlpt.distributed.ranks import LostContactError, Ranks, drain
from megatron_rlpt.errors import EngineError, EngineLostError, first_line
from megatron_rlpt.rollout.engine import Continuation, RolloutEngine, RolloutPrompt
from megatron_rlpt.rollout.vllm.engine import VllmEngine
from megatron_rlpt.rollout.weight_sync.manifest import Weights

_UNEVEN = 0.125
"""Allowed deviation from an even share, as a fraction of it, to keep prompts of one prefix on one engine. Reading a
prefix twice costs less than waiting for the engine with the largest share."""


class DistributedEngine(RolloutEngine):
    """A ``RolloutEngine`` that every rank calls concurrently with the same arguments."""

    def __init__(
        self,
        start: Callable[[], VllmEngine],
        groups: Sequence[Sequence[int]],
        ranks: Ranks,
        resend: Callable[[], Weights] | None = None,
    ) -> None:
        """Start the engines; call it on every rank.

        Args:
            start: starts the engine of this rank, or its part of one.
            groups: the ranks that take part in each engine.
            ranks: all ranks of the run.
            resend: returns the policy's weights, for an engine whose process ended while it generated and that has no
                copy of them; None if the policy may change meanwhile, so that the run has to be resumed.

        Raises:
            ModelError: an engine did not start, on this rank or another.
            EngineError: an engine failed while starting, on this rank or another.
        """
        self._ranks, self._resend = ranks, resend
        self._answering = [group[0] for group in groups]
        self._is_shared = any(len(group) > 1 for group in groups)
        self._mine = next((number for number, group in enumerate(groups) if ranks.rank in group), None)
        self._own = ranks.run_on_all_ranks(
            lambda: None if self._mine is None else start(), "the start of the rollout engines"
        )
        self._version: int | None = 0

    @property
    def own(self) -> VllmEngine | None:
        """The engine of this rank, or its part of one, if it has any."""
        return self._own

    @property
    @override
    def version(self) -> int | None:
        return None if self._own and self._own.asleep else self._version

    @override
    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        while True:
            try:
                return self._generate(prompts, max_tokens, version)
            except EngineLostError as error:
                if self._resend is None:
                    raise
                self._restart(error)
                self.update_weights(self._resend(), version)

    def _generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        def answer() -> _Share:
            if self._own is None or self._mine is None:
                return _Share(None)
            bounds = split_prompts(prompts, len(self._answering))
            try:
                found = self._own.generate(prompts[bounds[self._mine] : bounds[self._mine + 1]], max_tokens, version)
            except Exception as error:
                if not self._is_shared:
                    raise
                # The ranks that share the engine wait inside of it, where they cannot be told: end this rank.
                raise LostContactError(
                    f"rank {self._ranks.rank}: {first_line(error)}; the ranks that share its rollout engine end as well"
                ) from error
            digest = zlib.crc32(repr([one.tokens for one in found]).encode())
            return _Share(self._mine, digest, found if self._ranks.rank in self._answering else [])

        shares = self._ranks.all_gather(self._ranks.run_on_all_ranks(answer, "the end of generating"))
        for rank, share in enumerate(shares):
            if share.engine is not None and share.digest != shares[self._answering[share.engine]].digest:
                raise EngineError(
                    f"ranks {self._answering[share.engine]} and {rank} share a rollout engine and got different tokens "
                    "from it; run the same command to resume from the last checkpoint"
                )
        return [continuation for rank in self._answering for continuation in shares[rank].continuations]

    @override
    def update_weights(self, weights: Weights, version: int) -> None:
        """Replace all weights; an engine whose process ends meanwhile is started again, and ``weights`` read again."""
        while True:
            try:
                self._load(weights, lambda engine, stream: engine.update_weights(stream, version), version)
                return
            except EngineLostError as error:
                self._restart(error)

    def self_check(self, weights: Callable[[], Weights], version: int) -> None:
        """Run ``VllmEngine.self_check`` on every engine."""
        self._load(weights(), lambda engine, stream: engine.self_check(lambda: stream, version), version)

    def _restart(self, error: EngineLostError) -> None:
        """Start the engines again whose processes have ended.

        Raises:
            EngineLostError: there is none, or it has ended too often.
        """

        def restart() -> bool | None:
            if self._own is None or not self._own.is_lost:
                return None
            try:
                self._own.restart(error)
            except EngineLostError:
                return False
            return True

        phase = "the restart of the rollout engines"
        restarted = self._ranks.all_gather(self._ranks.run_on_all_ranks(restart, phase))
        if True not in restarted or False in restarted:
            raise error

    def sleep(self) -> None:
        """Let the engine of this rank sleep."""
        if self._own:
            self._own.sleep()

    def _load(self, weights: Weights, load: Callable[[VllmEngine, Weights], None], version: int) -> None:
        own = self._own
        self._version = None
        self._ranks.run_on_all_ranks(
            lambda: drain(weights, (lambda stream: load(own, stream)) if own else None),
            "the end of the weight update",
        )
        self._version = version


@dataclass(frozen=True)
class _Share:
    """What a rank's engine generated."""

    engine: int | None
    """Number of the engine; None if the rank has none."""
    digest: int = 0
    """Of all tokens: equal on all ranks that share the engine."""
    continuations: list[Continuation] = field(default_factory=list)
    """On the rank that answers for its engine."""


def split_prompts(prompts: Sequence[RolloutPrompt], count: int) -> list[int]:
    """Return the ``count + 1`` ascending indices that split ``prompts`` into ``count`` contiguous shares.

    Prompts with the same prefix are adjacent, and an engine reuses a prefix that it has already read. So each bound
    moves to the nearest change of prefix, unless that makes the shares too uneven.
    """
    even = len(prompts) / count
    changes = [
        index for index in range(len(prompts) + 1)
        if index in (0, len(prompts)) or prompts[index].prefix != prompts[index - 1].prefix
    ]  # fmt: skip
    bounds = [0]
    for share in range(1, count):
        ideal = share * even
        after = bisect_left(changes, ideal)
        change = min(changes[max(0, after - 1) : after + 1], key=lambda index: abs(index - ideal))
        bounds.append(change if abs(change - ideal) <= _UNEVEN * even else round(ideal))
    return [*bounds, len(prompts)]
