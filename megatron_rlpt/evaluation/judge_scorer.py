"""Score continuations with a judge: those of one prefix are judged as one group, like rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from typing_extensions import override

from megatron_rlpt.evaluation.scorers import Scorer, Tokens
from megatron_rlpt.observe import get_logger
from megatron_rlpt.rollout.readable import marked_if_blank, whole_characters
from megatron_rlpt.teacher.judge import Judge, check_failure_rate, failures, first_cause, most_frequent
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode, Group, Reward, Source

_log = get_logger(__name__)


class JudgeScorer(Scorer):
    """Scores with the training judge, or with another one as a second measure."""

    def __init__(self, judge: Judge, episodes: Sequence[Episode], text: TextTokens, max_failure_rate: float) -> None:
        self._judge = judge
        self._text = text
        self._max_failure_rate = max_failure_rate
        self._episodes = {episode.prefix: episode for episode in episodes}

    @property
    def inner(self) -> Judge:
        """The judge that scores."""
        return self._judge

    @override
    def score(self, prefixes: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[float | None]:
        """Return one reward per continuation; None where the judge failed or the continuation is blank.

        Raises:
            TeacherError: the judge failed on more than ``teacher.max_failure_rate``.
        """
        groups = []
        for prefix, rivals in groupby(zip(prefixes, continuations, strict=True), key=lambda pair: tuple(pair[0])):
            episode = self._episodes[prefix]
            written = (Candidate(Source.ROLLOUT, tuple(tokens)) for _, tokens in rivals)
            whole = (whole_characters(candidate, episode, self._text) for candidate in written)
            groups.append(Group(episode, tuple(marked_if_blank(candidate, self._text) for candidate in whole)))
        judged = self._judge.judge(groups)
        if check_failure_rate(judged, self._max_failure_rate):
            failed = failures(judged)
            _log.warning("the judge failed", reasons=most_frequent(failed), cause=first_cause(failed))
        return [reward.value if isinstance(reward, Reward) else None for group in judged for reward in group.rewards]
