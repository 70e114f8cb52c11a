"""Facts of an objective: everything that checks, planner and trainer need to know about it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlpt.types import Source


@dataclass(frozen=True)
class ObjectiveFacts:
    """Facts of one objective, as its class attribute ``facts``."""

    trains_on: frozenset[Source] = frozenset(Source)
    """Sources whose candidates it may select."""
    needs_judge: bool = True
    """Whether it selects by reward. Without a judge, every source in ``trains_on`` has to be offered."""
    needs_reference: bool = False
    """Whether ``loss`` reads the reference policy's log-probabilities. A reference costs memory and a forward pass."""
    sequences: int | None = 1
    """Most sequences of one example; None for every candidate that it may select."""
    least_candidates: int = 1
    """Fewest candidates of an episode that it can select from."""
    least_rollouts: int = 0
    """Fewest rollouts of an episode; its selection needs them, whatever else is offered."""
    on_policy: bool = False
    """Whether ``loss`` reads the probability with which a token was sampled: nothing but rollouts may be offered then,
    sampled at temperature 1."""
    settings: tuple[str, ...] = ()
    """Keys of the section ``objective`` that the constructor takes, by their own names."""

    def rows_per_example(self, *, original: bool, rewrite: bool, rollouts: int) -> int:
        """Return the most sequences that an update trains on per episode.

        Args:
            original: whether the original suffix is offered.
            rewrite: whether a rewrite is offered.
            rollouts: number of rollouts.
        """
        if self.sequences is not None:
            return self.sequences
        offered = {Source.ORIGINAL: int(original), Source.REWRITE: int(rewrite), Source.ROLLOUT: rollouts}
        return sum(count for source, count in offered.items() if source in self.trains_on)
