"""The reward that trains a rewriter: a good suffix copied, and a better and safe text in place of another (paper).

    answer ──> rewrite, read as in service ──> good suffix: 1 for its own tokens, else 0
                                           ──> other suffix: 0 if it cannot be used, else what the judge says of it

The judge compares the rewrite with the suffix that it replaces, in both orders, and says whether it is safe and true,
as far as ``teacher.generative`` gives these axes a weight; the reward is their weighted mean. A rewrite cannot be used
if it is shorter than the suffix (in words, because tokens differ between models) or no text at all, repeats the anchor
or begins inside a word.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from typing_extensions import override

from megatron_rlpt.config import GenerativeConfig, QualityConfig
from megatron_rlpt.config.evaluation_sets import FACTUALITY, QUALITY, SAFETY
from megatron_rlpt.teacher.comparisons import votes_per_order
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generative import CountingAsk, GenerativeJudge
from megatron_rlpt.teacher.generator import Ask, Reply
from megatron_rlpt.teacher.judge import GroupJudge, Judge
from megatron_rlpt.teacher.pairwise import PairwiseJudge
from megatron_rlpt.teacher.rewrite_answers import RewriteReader, ShownPassage
from megatron_rlpt.teacher.rewrite_label import RewriteLabel
from megatron_rlpt.teacher.rewrite_prompt import first_pieces, pieces, repeats_anchor, within_word
from megatron_rlpt.teacher.right_verdict import answer_text
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

NAME = "good_rewrite"
VERSION = "1"
REWRITE = "rewrite"
"""Key of ``Reward.detail``: what metrics are made of."""
_MEASURES = {QUALITY: "preferred", SAFETY: "safe", FACTUALITY: "true"}
"""Axis -> name of the share of rewrites whose mean verdict on it is above ``_HALF``."""
_HALF = 0.5


@dataclass(frozen=True)
class _Read:
    """The rewrite in an answer."""

    tokens: tuple[int, ...]
    """Empty if there is none."""
    problem: str
    """Why it cannot be used; empty if it can."""
    overlap: float
    """Share of the suffix's tokens that the passage has too."""
    copied: bool = False
    """Whether these are the suffix's own tokens."""


@dataclass(frozen=True)
class _Verdict:
    """What the judge says about a rewrite."""

    values: dict[str, float]
    """By axis, 0 to 1."""
    axes: dict[str, Any]
    """With their votes."""


class RewriteAnswers:
    """Answers to the prompts of a rewriter, read by the rules of the rewriter in service."""

    def __init__(self, text: TextTokens, control_tokens: Sequence[str]) -> None:
        """
        Args:
            text: text and tokens of the model in training.
            control_tokens: its own, which were broken up in texts that it saw.
        """
        self._text = text
        self._reader = RewriteReader(text, control_tokens)

    def shown(self, episode: Episode) -> tuple[RewriteLabel, ShownPassage] | Failed:
        """Return the label of a prompt and what it shows."""
        label = RewriteLabel.read(episode.label)
        return label if isinstance(label, Failed) else (label, label.shown(episode.id, self._text))

    def read(self, candidate: Candidate, episode: Episode, shown: ShownPassage) -> _Read:
        """Return the rewrite in an answer, as long as the suffix."""
        answer = answer_text(candidate, episode, self._text)
        before, suffix = shown.episode.prefix, shown.episode.suffix
        passage = self._reader.passage(Reply(answer, (), candidate.finish_reason or "stop"), shown)
        if isinstance(passage, Failed):
            return _Read((), passage.reason, 0.0)
        overlap = (Counter(passage[: len(suffix)]) & Counter(suffix)).total() / max(1, len(suffix))
        if tuple(passage) == suffix:
            return _Read(suffix, "", overlap, copied=True)
        # In service the policy's tokens count, which the model in training need not share.
        rewrite = first_pieces(self._text.text_of(passage, before), pieces(shown.suffix))
        if rewrite is None:
            return _Read((), "rewrite too short", overlap)
        return _Read(tuple(self._text.continue_with(before, rewrite)), _problem(answer, rewrite, shown), overlap)


def _problem(answer: str, rewrite: str, shown: ShownPassage) -> str:
    """Return why a rewrite that is long enough does not continue the prefix; empty if it does."""
    if repeats_anchor(answer, shown.prompt.anchor):
        return "rewrite repeats the anchor"
    inside = within_word(shown.prefix, rewrite) and not within_word(shown.prefix, shown.suffix)
    return "rewrite begins inside a word" if inside else ""


class GoodRewrite(GroupJudge):
    """Compares copies with good suffixes, and asks the judge's model about rewrites of the others."""

    def __init__(
        self, teacher: str, text: TextTokens, config: GenerativeConfig, seed: int, control_tokens: Sequence[str] = ()
    ) -> None:
        """
        Args:
            teacher: name of the judge's model, stored with every reward.
            text: text and tokens of the model in training.
            config: axes and sampling of the judge. Votes on quality are divided between both orders.
            seed: the run's seed.
            control_tokens: of the model in training.
        """
        self.name = f"{NAME}/{teacher}"
        self._text = text
        self._answers = RewriteAnswers(text, control_tokens)
        weights = {name: getattr(config, name).weight for name in _MEASURES}
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}
        quality = config.asked().quality
        votes = votes_per_order(quality.votes, quality.order)
        self._pairs = PairwiseJudge(QUALITY, teacher, text, config, seed, votes=votes)
        self._points = GenerativeJudge(teacher, text, replace(config, quality=QualityConfig(weight=0.0)), seed)

    @override
    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with one reward per candidate.

        ``detail["rewrite"]`` holds what ``rewrite_metrics`` counts, ``detail["axes"]`` values and votes of the judge.
        """
        known = self._answers.shown(group.episode)
        if isinstance(known, Failed):
            return replace(group, rewards=(known,) * len(group.candidates))
        label, shown = known
        start, counting = time.perf_counter(), CountingAsk(ask)
        read = [self._answers.read(one, group.episode, shown) for one in group.candidates]
        # Equal rewrites are judged once.
        asked = [] if label.good else list(dict.fromkeys(one.tokens for one in read if not one.problem))
        verdicts = await gather_or_cancel(self._verdict(tokens, label, shown, counting) for tokens in asked)
        judged = dict(zip(asked, verdicts, strict=True))
        rewards = [self._reward(one, label, judged.get(one.tokens)) for one in read]
        cost = counting.cost(time.perf_counter() - start) if asked else None
        return replace(group, rewards=tuple(rewards), cost=cost)

    async def _verdict(
        self, tokens: tuple[int, ...], label: RewriteLabel, shown: ShownPassage, ask: Ask
    ) -> _Verdict | Failed:
        """Ask the judge about one rewrite, on every axis that has a weight."""
        episode = shown.episode
        rewrite = Candidate(Source.REWRITE, tokens)
        groups = []
        if QUALITY in self._weights:
            pair = Group(episode, (rewrite, Candidate(Source.ORIGINAL, episode.suffix)))
            groups.append(self._pairs.judge_group(pair, ask))
        if self._weights.keys() - {QUALITY}:
            # What is true is in the good suffix.
            reference = tuple(self._text.continue_with(episode.prefix, label.reference))
            groups.append(self._points.judge_group(Group(replace(episode, suffix=reference), (rewrite,)), ask))
        axes: dict[str, Any] = {}
        for group in await gather_or_cancel(groups):
            reward = group.rewards[0]
            if isinstance(reward, Failed):
                return reward
            axes |= reward.detail.get("axes") or {QUALITY: _voted(reward)}
        return _Verdict({name: float(axis["value"]) for name, axis in axes.items()}, axes)

    def _reward(self, read: _Read, label: RewriteLabel, verdict: _Verdict | Failed | None) -> Reward | Failed:
        if isinstance(verdict, Failed):
            return verdict
        if label.good:
            return Reward(float(read.copied), self.name, VERSION, {REWRITE: _counted(read, label)})
        values = verdict.values if verdict else dict.fromkeys(self._weights, 0.0)
        said = {_MEASURES[name]: value > _HALF for name, value in values.items()}
        detail = {REWRITE: _counted(read, label) | said} | ({"axes": verdict.axes} if verdict else {})
        total = sum(self._weights[name] * value for name, value in values.items())
        return Reward(total / sum(self._weights.values()), self.name, VERSION, detail)


class RewriteForm(Judge):
    """What can be said of rewrites without a judge: 1 for a copied good suffix, or for a rewrite that can be used."""

    def __init__(self, text: TextTokens, control_tokens: Sequence[str] = ()) -> None:
        """
        Args:
            text: text and tokens of the model in training.
            control_tokens: of the model in training.
        """
        self._answers = RewriteAnswers(text, control_tokens)

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        return [replace(group, rewards=tuple(self._rewards(group))) for group in groups]

    def _rewards(self, group: Group) -> list[Reward | Failed]:
        known = self._answers.shown(group.episode)
        if isinstance(known, Failed):
            return [known] * len(group.candidates)
        label, shown = known
        read = [self._answers.read(one, group.episode, shown) for one in group.candidates]
        values = [one.copied if label.good else not one.problem for one in read]
        return [
            Reward(float(value), f"{NAME}/form", VERSION, {REWRITE: _counted(one, label)})
            for one, value in zip(read, values, strict=True)
        ]


def rewrite_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of rewrites; nothing without.

    ``rewrites/copied`` and ``rewrites/copied_tokens`` are about good suffixes: the share that is copied token for
    token, and the share of their tokens that the answer has too. About the others are the shares of rewrites that can
    be used (``rewrites/usable``) and that the judge calls safe (``safe``), true (``true``) and better than the suffix
    (``preferred``); one that cannot be used is none of them. ``rewrites/<name>/<kind>`` is the same by kind.
    """
    found: dict[str, list[float]] = {}
    for row in _rows(groups):
        about = ("copied", "copied_tokens") if row["good"] else ("usable", *_MEASURES.values())
        names = [name for name in about if name in row]
        # How much of a bad suffix is left is told by kind only.
        kinds = ["copied_tokens"] if row["good"] else [*names, "copied_tokens"]
        for name in names:
            found.setdefault(f"rewrites/{name}", []).append(float(row[name]))
        for name in kinds:
            found.setdefault(f"rewrites/{name}/{row['kind']}", []).append(float(row[name]))
    return {name: fmean(values) for name, values in sorted(found.items())}


def _rows(groups: Sequence[Group]) -> Iterator[Mapping[str, Any]]:
    for group in groups:
        for _, reward in group.rewarded() if group.rewards else ():
            if isinstance(row := reward.detail.get(REWRITE), Mapping):
                yield row


def _counted(read: _Read, label: RewriteLabel) -> dict[str, Any]:
    return {
        "kind": label.kind,
        "good": label.good,
        "copied": read.copied,
        "copied_tokens": read.overlap,
        "usable": not read.problem,
        "problem": read.problem,
    }


def _voted(pair: Reward) -> dict[str, Any]:
    """Return a comparison as ``GenerativeJudge`` writes an axis."""
    votes = [
        vote | {"verdict": vote["first_wins"] if "first_wins" in vote else {"failed": vote["failed"]}}
        for vote in pair.detail["votes"]
    ]
    return {"value": pair.value, "votes": votes}
