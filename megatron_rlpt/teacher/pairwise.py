"""Compare two continuations by asking a prompted judge, in both orders: better, coherent, closer to the truth.

Training ranks many candidates (``generative.py``); an evaluation compares two models, so every question here is about a
pair, is asked in both orders equally often, and may end in a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from typing_extensions import override

from megatron_rlpt.config import AnswerForm, GenerativeConfig
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Ask, Message, Reply, Request
from megatron_rlpt.teacher.judge import GroupJudge
from megatron_rlpt.teacher.prompts import build_prompt, version_of
from megatron_rlpt.teacher.verdicts.direct import ALTERNATIVES, direct_comparison, direct_quality
from megatron_rlpt.teacher.verdicts.parsing import parse_comparison, parse_quality, schema
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import BLANK, Failed, Group, Reward, derive_seed


def _first_wins(reply: Reply) -> float | Failed:
    verdict = parse_quality(reply)
    return verdict if isinstance(verdict, Failed) else 1.0 - verdict


@dataclass(frozen=True)
class _Question:
    reasoned: Callable[[Reply], float | Failed]
    direct: Callable[[Reply], float | Failed]
    shows_reference: bool = False


QUESTIONS: Mapping[str, _Question] = {
    "quality": _Question(_first_wins, direct_quality),
    "coherence": _Question(parse_comparison, direct_comparison),
    "facts": _Question(parse_comparison, direct_comparison, shows_reference=True),
}
"""Name of a question and of its prompt -> how a reply is read."""


class PairwiseJudge(GroupJudge):
    """Compares groups of two candidates; the reward of each is its share of the verdicts, and a tie is half of one."""

    def __init__(
        self, question: str, teacher: str, text: TextTokens, config: GenerativeConfig, seed: int, *, votes: int = 1
    ) -> None:
        """
        Args:
            question: key of ``QUESTIONS``. For ``facts`` an episode's suffix is the text that is true.
            teacher: name of the model, stored with every reward.
            text: converts between text and tokens of the policy.
            config: form of answers and sampling.
            seed: other seeds give other votes, unless answers are direct or greedy.
            votes: times that a pair is shown in either order.
        """
        self.name = f"pairwise/{teacher}"
        self._name, self._question = question, QUESTIONS[question]
        self._text = text
        self._config = config.asked()
        self._seed = seed
        self._votes = 1 if self._config.temperature == 0 else votes
        self._direct = self._config.answer is AnswerForm.direct

    @override
    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with two rewards that add up to 1, or with two failures.

        A failed reply is left out. ``detail["votes"]`` holds every vote: which candidate was shown first, seed,
        reply and verdict.

        Raises:
            ValueError: the group does not have two candidates.
        """
        if len(group.candidates) != 2:
            raise ValueError(f"a comparison has {len(group.candidates)} candidates; needed: 2")
        blank = [one.blank or self._text.is_blank(one.tokens) for one in group.candidates]
        if any(blank):
            reasons = [BLANK if is_blank else Failed("nothing to compare with") for is_blank in blank]
            return replace(group, rewards=tuple(reasons))
        if group.candidates[0].tokens == group.candidates[1].tokens:
            return replace(group, rewards=(self._reward(0.5, []), self._reward(0.5, [])))
        texts = [self._text.text_of(one.tokens, group.episode.prefix) for one in group.candidates]
        votes = await gather_or_cancel(
            self._vote(group, texts, first, number, ask) for number in range(self._votes) for first in (0, 1)
        )
        shares = [share for share, _ in votes if not isinstance(share, Failed)]
        records = [record for _, record in votes]
        if not shares:
            failed = next(share for share, _ in votes if isinstance(share, Failed))
            failed = replace(failed, detail={**failed.detail, "votes": records})
            return replace(group, rewards=(failed, failed))
        share = fmean(shares)
        return replace(group, rewards=(self._reward(share, records), self._reward(1.0 - share, records)))

    def _reward(self, value: float, votes: list[dict[str, Any]]) -> Reward:
        version = version_of(self._name, self._config.answer, self._config.prompt)
        return Reward(value, self.name, version, {"votes": votes})

    async def _vote(
        self, group: Group, texts: list[str], first: int, number: int, ask: Ask
    ) -> tuple[float | Failed, dict[str, Any]]:
        """Return how much of the vote candidate 0 gets with candidate ``first`` shown first, and its record."""
        episode = group.episode
        seed = derive_seed(self._seed, episode.id, self._name, first, number)
        shown = {"prefix": prefix_text(self._text, episode), "first": texts[first], "second": texts[1 - first]}
        if self._question.shows_reference:
            shown["reference"] = self._text.text_of(episode.suffix, episode.prefix)
        fence = derive_seed(self._seed, episode.id)
        prompt = build_prompt(self._name, fence, self._config.answer, self._config.prompt, **shown)
        reply = await ask(
            Request(
                prompt=(Message("user", prompt.text),),
                seed=seed,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
                json_schema="" if self._direct else schema(self._name),
                alternatives=ALTERNATIVES if self._direct else 0,
                episode=episode.id,
            )
        )
        record: dict[str, Any] = {"first": first, "seed": seed}
        if isinstance(reply, Failed):
            return reply, record | {"failed": reply.reason}
        read = self._question.direct if self._direct else self._question.reasoned
        wins = read(reply)
        if isinstance(wins, Failed):
            return wins, record | {"failed": wins.reason, "reply": reply.text}
        return (wins if first == 0 else 1.0 - wins), record | {"first_wins": wins, "reply": reply.text}
