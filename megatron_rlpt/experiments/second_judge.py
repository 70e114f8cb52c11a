"""What a judge that took no part in training says about the policies of an experiment, prefix by prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rlpt.config import load_config
from megatron_rlpt.config.evaluation_sets import FACTUALITY, QUALITY, SAFETY
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.evaluation.judges import open_judges
from megatron_rlpt.evaluation.measures import SetJudging, Written
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.experiments.columns import JUDGED_QUALITY, JUDGED_SAFE, JUDGED_TRUE
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Episode
from megatron_rlpt.world.sampling import Sampled

_POLICY, _AGAINST = "policy", "against"
_TIE = 0.5

Judged = list[dict[str, float | None]]
"""By prefix: how often the policy wins (``judged_quality``), and whether its text is safe (``judged_safe``) and true
(``judged_true``); None where the judge failed, or does not decide that."""


class SecondJudge:
    """A judge of ``measure.judge``."""

    def __init__(self, config: Path) -> None:
        """
        Args:
            config: file whose ``teacher`` is the judge.

        Raises:
            ConfigError: the file is wrong.
        """
        self._judge = open_judges(load_config(config), {})[0]

    def judge(
        self,
        policy: Path,
        own: Mapping[str, Sequence[Sampled]],
        against: Mapping[str, Sequence[Sampled]] | None,
        true: Mapping[str, Sequence[Sampled]],
    ) -> dict[str, Judged]:
        """Compare continuations in both orders, and say which are safe and which are true.

        Args:
            policy: Hugging Face folder of the policy, for its tokenizer.
            own: name of a set of prefixes -> the policy's continuations.
            against: those of the policy that it is compared with; None if it is that one, which ties with itself.
            true: what the documents themselves go on with: a judge of factuality reads it beside the text.

        Returns:
            Name of the set -> what is said of every continuation.

        Raises:
            TeacherError: the judge failed on more than ``teacher.max_failure_rate``.
            ModelError: its model cannot be used.
        """
        text = PolicyTokenizer(policy)
        try:
            return {
                name: self._of_set(name, text, rows, None if against is None else against[name], true[name])
                for name, rows in own.items()
            }
        finally:
            self._judge.close()  # the next policy trains with this memory

    def _of_set(
        self,
        name: str,
        text: PolicyTokenizer,
        own: Sequence[Sampled],
        against: Sequence[Sampled] | None,
        true: Sequence[Sampled],
    ) -> Judged:
        episodes = tuple(
            Episode(f"{name}-{index}", one.prefix_tokens, one.tokens, name, str(index), len(one.prefix_tokens))
            for index, one in enumerate(true)
        )
        measures = (SAFETY, FACTUALITY) if against is None else (QUALITY, SAFETY, FACTUALITY)
        texts = {_AGAINST: (tuple(one.tokens for one in against),)} if against is not None else {}
        texts[_POLICY] = (tuple(one.tokens for one in own),)
        written = Written(PromptSet(name, "heldout", "", measures, episodes=episodes), "sampled", texts, _AGAINST)
        unknown: list[float | None] = [None] * len(own)
        found: dict[str, list[float | None]]
        found = {QUALITY: [_TIE] * len(own), SAFETY: unknown, FACTUALITY: unknown}
        for column in SetJudging(written, text, 1, Ranks()).columns(self._judge):
            if column.model == _POLICY and column.measure in found:
                found[column.measure] = [row[0] if row else None for row in column.by_take]
        return [
            {JUDGED_QUALITY: quality, JUDGED_SAFE: safe, JUDGED_TRUE: factuality}
            for quality, safe, factuality in zip(found[QUALITY], found[SAFETY], found[FACTUALITY], strict=True)
        ]
