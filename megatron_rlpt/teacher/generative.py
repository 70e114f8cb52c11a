"""The generative judge: a post-trained model is asked, its verdicts are parsed, counted and explained.

    groups -> questions (one per axis, candidate or pair, and vote) -> generator -> verdicts -> axes -> outcomes

All questions of a call go to the generator at once. Candidates with equal tokens are judged once and share the result:
comparing a text with itself would only add noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rlpt.config.schema import AxisConfig, GenerativeConfig
from megatron_rlpt.records import Failed, Group, Score, derive_seed
from megatron_rlpt.teacher.aggregation import Decided, Match, combine, mean_of_votes, round_robin, standings
from megatron_rlpt.teacher.generator import Message, Reply, Request, TextGenerator
from megatron_rlpt.teacher.prompts import VERSIONS, build_prompt
from megatron_rlpt.teacher.verdicts import parse_factuality, parse_quality, parse_safety

Decode = Callable[[Sequence[int]], str]
"""Token ids of the policy's tokenizer to text, special tokens left out."""

_POINTWISE: dict[str, Callable[[Reply], float | Failed]] = {"safety": parse_safety, "factuality": parse_factuality}


@dataclass(frozen=True)
class _Question:
    """One request, and what its answer is about."""

    axis: str
    about: Match | tuple[int, int]
    """A match of two texts (quality), or (text, vote)."""
    request: Request


class GenerativeJudge:
    """Scores candidates by prompting: quality pairwise, safety and factuality pointwise (paper, section on judges)."""

    def __init__(self, generator: TextGenerator, decode: Decode, config: GenerativeConfig, seed: int) -> None:
        """``seed`` is the run's seed; every question derives its own from it and from what it is about."""
        self.name = f"generative/{generator.name}"
        self._generator = generator
        self._decode = decode
        self._config = config
        self._seed = seed
        axes: dict[str, AxisConfig] = {
            "quality": config.quality,
            "safety": config.safety,
            "factuality": config.factuality,
        }
        self._axes = {name: axis for name, axis in axes.items() if axis.weight > 0}
        self._weights = {name: axis.weight for name, axis in self._axes.items()}
        self._version = "+".join(VERSIONS[name] for name in self._axes)

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with one outcome per candidate.

        ``detail["axes"]`` holds each axis' value and its votes: seed, reply, verdict or failure. A vote on a pair names
        candidates by their index, is listed with both, and has its reply with the one shown first.
        ``detail["standings"]`` holds position and flip statistics of the round robin.
        """
        texts = [_distinct(group) for group in groups]
        questions = [self._questions(group, distinct) for group, distinct in zip(groups, texts, strict=True)]
        replies = iter(self._generator.generate([question.request for row in questions for question in row]))
        judged = []
        for group, distinct, row in zip(groups, texts, questions, strict=True):
            places = [next(i for i, c in enumerate(group.candidates) if c.tokens == tokens) for tokens in distinct]
            outcomes = self._outcomes(places, [(question, next(replies)) for question in row])
            by_tokens = dict(zip(distinct, outcomes, strict=True))
            empty = Failed("empty candidate")
            judged.append(replace(group, outcomes=tuple(by_tokens.get(c.tokens, empty) for c in group.candidates)))
        return judged

    def _questions(self, group: Group, distinct: Sequence[tuple[int, ...]]) -> list[_Question]:
        episode = group.episode
        prefix = self._decode(episode.prefix)
        texts = [self._decode(tokens) for tokens in distinct]
        questions = []
        for name, axis in self._axes.items():
            if name == "quality":
                order_seed = derive_seed(self._seed, episode.id, name, "order")
                for match in round_robin(len(texts), axis.votes, order_seed):
                    pair = (min(match.first, match.second), max(match.first, match.second))
                    seed = derive_seed(self._seed, episode.id, name, *pair, match.vote)
                    shown = {"prefix": prefix, "first": texts[match.first], "second": texts[match.second]}
                    questions.append(_Question(name, match, self._request(name, seed, shown)))
                continue
            for place, text in enumerate(texts):
                for vote in range(axis.votes):
                    seed = derive_seed(self._seed, episode.id, name, place, vote)
                    shown = {"text": text}
                    if name == "factuality":
                        shown |= {"prefix": prefix, "reference": self._decode(episode.suffix)}
                    questions.append(_Question(name, (place, vote), self._request(name, seed, shown)))
        return questions

    def _request(self, name: str, seed: int, texts: dict[str, str]) -> Request:
        return Request(
            prompt=(Message("user", build_prompt(name, seed, **texts).text),),
            seed=seed,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
        )

    def _outcomes(
        self, places: Sequence[int], answers: Sequence[tuple[_Question, Reply | Failed]]
    ) -> list[Score | Failed]:
        """One outcome per distinct text; ``places`` are the indices of the candidates that have these texts."""
        texts = len(places)
        values: list[dict[str, float | Failed]] = [{} for _ in range(texts)]
        axes: list[dict[str, Any]] = [{} for _ in range(texts)]
        detail: list[dict[str, Any]] = [{"axes": row} for row in axes]
        for name in self._axes:
            own = [(question, reply) for question, reply in answers if question.axis == name]
            axis_values, votes, extra = _quality(places, own) if name == "quality" else _pointwise(name, texts, own)
            for text, value in enumerate(axis_values):
                values[text][name] = value
                axes[text][name] = {"value": _plain(value), "votes": votes[text]}
                detail[text].update(extra)
        outcomes: list[Score | Failed] = []
        for text in range(texts):
            total = combine(values[text], self._weights)
            if isinstance(total, Failed):
                outcomes.append(Failed(total.reason, detail[text]))
            else:
                outcomes.append(Score(total, self.name, self._version, detail[text]))
        return outcomes


_AxisResult = tuple[Sequence[float | Failed], list[list[dict[str, Any]]], dict[str, Any]]
"""Value per text, votes per text, and what to add to every text's detail."""


def _quality(places: Sequence[int], answers: Sequence[tuple[_Question, Reply | Failed]]) -> _AxisResult:
    texts = len(places)
    votes: list[list[dict[str, Any]]] = [[] for _ in range(texts)]
    results = []
    for question, reply in answers:
        match = question.about
        assert isinstance(match, Match)
        option = reply if isinstance(reply, Failed) else parse_quality(reply)
        winner = option if isinstance(option, Failed) else (match.first, match.second)[option]
        results.append(Decided(match, winner))
        named = winner if isinstance(winner, Failed) else places[winner]
        record = {"first": places[match.first], "second": places[match.second], "vote": match.vote}
        record |= _verdict(question, named)
        votes[match.first].append(record | {"reply": _text(reply)})
        votes[match.second].append(record)
    table = standings(texts, results)
    values = table.values if texts > 1 else [Failed("nothing to compare with")] * texts
    statistics = {
        "first_rate": table.first_rate,
        "flip_rate": table.flip_rate,
        "decided": table.decided,
        "failed": table.failed,
    }
    return values, votes, {"standings": statistics}


def _pointwise(name: str, texts: int, answers: Sequence[tuple[_Question, Reply | Failed]]) -> _AxisResult:
    votes: list[list[dict[str, Any]]] = [[] for _ in range(texts)]
    given: list[list[float | Failed]] = [[] for _ in range(texts)]
    for question, reply in answers:
        assert isinstance(question.about, tuple)
        place, vote = question.about
        value = reply if isinstance(reply, Failed) else _POINTWISE[name](reply)
        given[place].append(value)
        votes[place].append({"vote": vote} | _verdict(question, value) | {"reply": _text(reply)})
    return [mean_of_votes(row) for row in given], votes, {}


def _verdict(question: _Question, value: float | Failed) -> dict[str, Any]:
    return {"seed": question.request.seed, "verdict": _plain(value)}


def _plain(value: float | Failed) -> Any:
    return {"failed": value.reason} | value.detail if isinstance(value, Failed) else value


def _text(reply: Reply | Failed) -> str | None:
    return None if isinstance(reply, Failed) else reply.text


def _distinct(group: Group) -> list[tuple[int, ...]]:
    """The candidates' different texts in order; empty ones are left out, nobody should win by meeting them."""
    return [tokens for tokens in dict.fromkeys(candidate.tokens for candidate in group.candidates) if tokens]
