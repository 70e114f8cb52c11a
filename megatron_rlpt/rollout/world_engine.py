"""The engines of a world of several ranks behind the protocol of one.

    ranks with an engine   generate their share of the prompts, take over weights
    all ranks              ask for the same prompts, get every answer, iterate over the weights

Without GPUs only rank 0 has an engine; with them every rank has its own. A rank that fails tells the others, so that
all of them stop with the same error instead of waiting for one that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from megatron_rlpt.errors import EngineError, ModelError, RlptError
from megatron_rlpt.rollout.engine import Continuation, Prompt
from megatron_rlpt.rollout.manifest import Weights
from megatron_rlpt.rollout.vllm_engine import VllmEngine

T = TypeVar("T")


class WorldEngine:
    """A ``RolloutEngine`` that every rank calls at the same time with the same arguments."""

    def __init__(self, start: Callable[[], VllmEngine], owners: Sequence[int]) -> None:
        """Start the engines; called on every rank.

        Args:
            start: starts the engine of this rank.
            owners: ranks that have one, ascending.

        Raises:
            ModelError: an engine did not start, on this rank or another.
            EngineError: likewise.
        """
        self._rank = torch.distributed.get_rank()
        self._owners = tuple(owners)
        # Answers and errors are Python objects: they travel over gloo whatever the world computes on.
        self._group = torch.distributed.new_group(backend="gloo")
        self._own: VllmEngine | None = None
        self._own = self._together(start if self._rank in self._owners else None)[self._rank]
        self._version: int | None = 0

    @property
    def own(self) -> VllmEngine | None:
        """The engine of this rank."""
        return self._own

    @property
    def version(self) -> int | None:
        """Policy version of the weights in force; the same on every rank, None after an update that failed."""
        return None if self._own and self._own.asleep else self._version

    def generate(self, prompts: Sequence[Prompt], max_tokens: int, version: int) -> list[Continuation]:
        """See ``RolloutEngine.generate``; every rank gets all continuations, in order."""
        own = self._own
        share = prompts[self._owners.index(self._rank) :: len(self._owners)] if own else []
        shares = self._together((lambda: own.generate(share, max_tokens, version)) if own else None)
        answers: list[Any] = [None] * len(prompts)
        for index, owner in enumerate(self._owners):
            answers[index :: len(self._owners)] = shares[owner]
        return answers

    def update_weights(self, weights: Weights, version: int) -> None:
        """See ``RolloutEngine.update_weights``; ``weights`` may need all ranks to iterate at the same time."""
        self._version = None
        self._together(self._loading(lambda engine, stream: engine.update_weights(stream, version), weights))
        self._version = version

    def self_check(self, weights: Callable[[], Weights], version: int) -> None:
        """See ``VllmEngine.self_check``."""
        self._version = None
        self._together(self._loading(lambda engine, stream: engine.self_check(lambda: stream, version), weights()))
        self._version = version

    def sleep(self) -> None:
        """See ``VllmEngine.sleep``."""
        if self._own:
            self._own.sleep()

    def _loading(self, load: Callable[[VllmEngine, Weights], None], weights: Weights) -> Callable[[], None]:
        def run() -> None:
            stream = iter(weights)
            failure: RlptError | None = None
            try:
                if self._own:
                    load(self._own, stream)
            except RlptError as error:
                failure = error
            # The other ranks go on to the end, and what is behind the stream may wait for this one.
            for _ in stream:
                pass
            if failure:
                raise failure

        return run

    def _together(self, work: Callable[[], T] | None) -> list[Any]:
        """What ``work`` returned on every rank (None where there was none), or the first error on every rank."""
        outcome: tuple[Any, str | None, bool] = (None, None, False)
        mine: RlptError | None = None
        try:
            if work:
                outcome = (work(), None, False)
        except RlptError as error:
            mine, outcome = error, (None, str(error), isinstance(error, ModelError))
        value, text, of_model = outcome
        # The engine itself cannot travel, and nobody else needs it.
        local = isinstance(value, VllmEngine)
        outcomes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(outcomes, (None if local else value, text, of_model), group=self._group)
        if mine:
            raise mine
        for rank, (_, failure, of_model) in enumerate(outcomes):
            if failure is not None:
                raise (ModelError if of_model else EngineError)(f"rank {rank}: {failure}")
        results = [result for result, _, _ in outcomes]
        results[self._rank] = value
        return results
