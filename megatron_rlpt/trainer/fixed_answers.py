"""The evaluation of a run on prompts while it trains: greedy answers to the same held-out prompts, every N steps.

The share of right answers, of answers that can be parsed and of verdicts that change with the order of the options, or
of suffixes that are copied and improved, are the curves by which a teacher in training is judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rlpt.rollout.engine import RolloutEngine, RolloutPrompt
from megatron_rlpt.teacher.good_rewrite import rewrite_metrics
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.right_verdict import answer_metrics
from megatron_rlpt.types import Candidate, Episode, Group, Source

_PREFIX = "evaluation/"


class FixedAnswers:
    """Answers the same prompts again and again. All ranks call its methods together."""

    def __init__(
        self,
        prompts: Sequence[Episode],
        engine: RolloutEngine,
        judge: Judge,
        *,
        length: int,
    ) -> None:
        """
        Args:
            prompts: the same on every rank.
            engine: generates with the policy's weights.
            judge: knows what to make of labels; all ranks call it together.
            length: most tokens of an answer.
        """
        self._prompts, self._engine, self._judge = list(prompts), engine, judge
        self._length = length
        self._begun = False

    def begin(self, version: int) -> dict[str, float]:
        """Return the measures of the starting policy, unless a checkpoint is from after it."""
        return {} if self._begun else self.measure(version)

    def measure(self, version: int) -> dict[str, float]:
        """Return measures of the policy by metric: ``evaluation/answers/...``, ``/rewrites/...`` and ``/reward``."""
        self._begun = True
        asked = [RolloutPrompt(episode.prefix, 0, greedy=True) for episode in self._prompts]
        answers = self._engine.generate(asked, self._length, version)
        groups = [
            Group(episode, (Candidate(Source.ROLLOUT, one.tokens, finish_reason=one.finish_reason),))
            for episode, one in zip(self._prompts, answers, strict=True)
        ]
        judged = self._judge.judge(groups)
        rewards = [reward.value for group in judged for _, reward in group.rewarded()]
        metrics = {"reward": sum(rewards) / len(rewards)} if rewards else {}
        metrics |= answer_metrics(judged) | rewrite_metrics(judged)
        return {_PREFIX + name: value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return whether the starting policy has been measured."""
        return {"begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a ``state_dict``."""
        self._begun = bool(state["begun"])
