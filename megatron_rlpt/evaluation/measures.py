"""What judges and counts say about the continuations of a set, one *column* of values per model.

A column holds ``[prompt][value]``; a result is its mean with an interval that resamples prompts. Several values of a
prompt come from several samples, or from several seeds of a judge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_rlpt.config.evaluation_sets import COHERENCE, FACTS, FACTUALITY, QUALITY, SAFETY
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.evaluation.generation import GREEDY, Texts
from megatron_rlpt.evaluation.judges import NamedJudge, comparison_group
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.evaluation.results import Scale
from megatron_rlpt.evaluation.statistics import outcome
from megatron_rlpt.evaluation.text_metrics import REPEATED_NGRAM
from megatron_rlpt.evaluation.verdicts import BLOCK
from megatron_rlpt.teacher.likelihood_reward import repetition
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Group, Reward

ORIGINAL = "original"
"""Stands for a model where the documents' own suffixes are measured."""
REWARD = "reward"
"""Measure: the mean of what a judge gives that scores continuations one by one."""
COMPARED = (QUALITY, COHERENCE, FACTS)
"""Measures that compare two continuations."""

Values = tuple[tuple[float | None, ...], ...]
"""``[prompt][value]``; None where there is none."""


@dataclass(frozen=True)
class MeasureColumn:
    """What one judge, or a count, says about one model on one set."""

    measure: str
    scale: Scale
    model: str
    set: str
    values: Values
    against: str = ""
    judge: str = ""
    decoding: str = ""
    unit: str = ""
    higher_is_better: bool | None = True
    takes: int = 1
    """Continuations per prompt; several values of one come from the seeds of a judge, take after take."""

    @property
    def by_take(self) -> Values:
        """``[prompt][take]``: means over seeds; None where nothing was decided."""
        return tuple(
            tuple(_mean([one for one in row[take :: self.takes] if one is not None]) for take in range(self.takes))
            if row
            else ()
            for row in self.values
        )


@dataclass(frozen=True)
class Written:
    """The continuations of all models on one set under one decoding."""

    prompts: PromptSet
    decoding: str
    texts: Mapping[str, Texts]
    """By model, the reference first: ``[take][prompt]``."""
    reference: str

    @property
    def challengers(self) -> list[str]:
        """Models that are compared with the reference."""
        return [name for name in self.texts if name != self.reference]


def counted(written: Written) -> Iterator[MeasureColumn]:
    """Yield the measures that need no judge: repeated trigrams and length."""
    everything = dict(written.texts)
    originals = tuple(one.suffix for one in written.prompts.episodes)
    if all(originals) and written.decoding == GREEDY:
        everything[ORIGINAL] = (originals,)
    for model, texts in everything.items():
        name, decoding = written.prompts.name, "" if model == ORIGINAL else written.decoding
        by_prompt = list(zip(*texts, strict=True))
        repeated = tuple(tuple(repetition(one, REPEATED_NGRAM) for one in takes) for takes in by_prompt)
        lengths = tuple(tuple(float(len(one)) for one in takes) for takes in by_prompt)
        yield MeasureColumn(
            "repetition", Scale.share, model, name, repeated, decoding=decoding, higher_is_better=False,
            takes=len(texts),
        )  # fmt: skip
        yield MeasureColumn(
            "length", Scale.value, model, name, lengths, decoding=decoding, unit="tokens", higher_is_better=None,
            takes=len(texts),
        )  # fmt: skip


class SetJudging:
    """Judges the continuations of a set, sharing the work with the other ranks."""

    def __init__(self, written: Written, text: TextTokens, seeds: int, ranks: Ranks) -> None:
        """
        Args:
            written: what to judge.
            text: tokenizer of the models.
            seeds: times that a judge is asked whose answers depend on a seed.
            ranks: all ranks; every one calls every method.
        """
        self._written = written
        self._text = text
        self._seeds = seeds
        self._ranks = ranks

    def columns(self, judge: NamedJudge) -> Iterator[MeasureColumn]:
        """Yield what ``judge`` says about every measure that it decides and the set has.

        Raises:
            TeacherError: the judge failed on more than ``teacher.max_failure_rate``, or no server answers.
            ModelError: its model cannot be used.
        """
        wanted = [one for one in self._written.prompts.measures if _decides(judge, one)]
        if judge.prompted:
            for measure in wanted:
                yield from (self._compared if measure in COMPARED else self._labelled)(judge, measure)
        elif wanted:
            yield from self._scored(judge, wanted)

    def _compared(self, judge: NamedJudge, measure: str) -> Iterator[MeasureColumn]:
        """Yield how often each model wins against the reference when a prompted judge compares the two."""

        def ask(groups: Sequence[Group], seed: int) -> list[Group]:
            return judge.compare(groups, seed, measure)

        reference = self._written.reference
        for model in self._written.challengers:
            judged = self._judged(judge, (reference, model), ask, with_suffix=measure == FACTS)
            yield self._column(measure, Scale.win_rate, model, judged[model], judge, against=reference)

    def _labelled(self, judge: NamedJudge, measure: str) -> Iterator[MeasureColumn]:
        """Yield what a prompted judge says about each continuation by itself."""

        def ask(groups: Sequence[Group], seed: int) -> list[Group]:
            return judge.judge(groups, seed, measure)

        for model in self._written.texts:
            values = self._judged(judge, (model,), ask, with_suffix=measure == FACTUALITY)[model]
            values = self._majority(values) if measure == SAFETY else values
            yield self._column(measure, Scale.share, model, values, judge)

    def _scored(self, judge: NamedJudge, wanted: Sequence[str]) -> Iterator[MeasureColumn]:
        """Yield measures by a judge that gives numbers: what they are, or which of two is higher."""
        reference, models = self._written.reference, tuple(self._written.texts)
        if judge.is_relative:
            pairs = {one: self._judged(judge, (reference, one), judge.judge) for one in self._written.challengers}
        else:
            scores = self._judged(judge, models, judge.score)
            pairs = {one: {reference: scores[reference], one: scores[one]} for one in self._written.challengers}
            for model in models:
                for measure in wanted:
                    if measure not in COMPARED:
                        values = self._majority(scores[model]) if measure == SAFETY else scores[model]
                        yield self._column(measure, _scale(values), model, values, judge)
                yield self._column(REWARD, Scale.value, model, scores[model], judge)
        for measure in wanted:
            for model, pair in pairs.items():
                if measure in COMPARED:
                    won = _outcomes(pair[model], pair[reference])
                    yield self._column(measure, Scale.win_rate, model, won, judge, against=reference)

    def _judged(
        self,
        judge: NamedJudge,
        models: tuple[str, ...],
        ask: Callable[[Sequence[Group], int], list[Group]],
        *,
        with_suffix: bool = False,
    ) -> dict[str, Values]:
        """Return the rewards of the continuations of ``models``, which are one group per prompt and take.

        Args:
            judge: is asked once per seed if its answers depend on it.
            models: in the order of the candidates.
            ask: judges groups with a seed.
            with_suffix: leave out prompts of which is not known how they go on.
        """
        texts = [self._written.texts[one] for one in models]
        groups, places = [], []
        for prompt, episode in enumerate(self._written.prompts.episodes):
            if with_suffix and not episode.suffix:
                continue
            for take in range(len(texts[0])):
                groups.append(comparison_group(episode, [one[take][prompt] for one in texts], self._text))
                places.append(prompt)
        count = len(self._written.prompts.episodes)
        rewards: dict[str, list[list[float | None]]] = {one: [[] for _ in range(count)] for one in models}
        for seed in range(self._seeds if judge.seeded else 1):
            judged = self._shared(groups, functools.partial(_with_seed, ask, seed))
            for prompt, group in zip(places, judged, strict=True):
                for model, reward in zip(models, group.rewards, strict=True):
                    rewards[model][prompt].append(reward.value if isinstance(reward, Reward) else None)
        return {model: tuple(map(tuple, rows)) for model, rows in rewards.items()}

    def _shared(self, groups: list[Group], work: Callable[[list[Group]], list[Group]]) -> list[Group]:
        """Let every rank judge some whole blocks of ``groups``; return all of them in order."""
        blocks = [groups[start : start + BLOCK] for start in range(0, len(groups), BLOCK)]

        def judge(share: list[list[Group]]) -> list[list[Group]]:
            judged = iter(work([group for block in share for group in block]) if share else [])
            return [[next(judged) for _ in block] for block in share]

        return [group for block in self._ranks.scatter_work(blocks, judge, "the end of judging") for group in block]

    def _majority(self, values: Values) -> Values:
        """Return the verdict of most votes on every continuation: 1, 0, or one half where they are equal."""
        shares = MeasureColumn(SAFETY, Scale.share, "", "", values, takes=self._takes).by_take
        return tuple(tuple(None if one is None else _side(one) for one in row) for row in shares)

    @property
    def _takes(self) -> int:
        return len(next(iter(self._written.texts.values())))

    def _column(
        self, measure: str, scale: Scale, model: str, values: Values, judge: NamedJudge, against: str = ""
    ) -> MeasureColumn:
        return MeasureColumn(
            measure,
            scale,
            model,
            self._written.prompts.name,
            values,
            against,
            judge.facts.name,
            self._written.decoding,
            takes=self._takes,
        )


def _with_seed(ask: Callable[[Sequence[Group], int], list[Group]], seed: int, groups: list[Group]) -> list[Group]:
    return ask(groups, seed)


def _decides(judge: NamedJudge, measure: str) -> bool:
    """Whether ``judge`` decides ``measure``; comparing the truth of two texts is a form of judging factuality."""
    return (FACTUALITY if measure == FACTS else measure) in judge.measures


def _outcomes(values: Values, reference: Values) -> Values:
    return tuple(
        tuple(outcome(one, two) for one, two in zip(ones, twos, strict=True))
        for ones, twos in zip(values, reference, strict=True)
    )


def _scale(values: Values) -> Scale:
    """Return ``share`` for numbers from 0 to 1."""
    return Scale.share if all(one is None or 0 <= one <= 1 for row in values for one in row) else Scale.value


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _side(share: float) -> float:
    return 0.5 if share == 0.5 else float(share > 0.5)
