"""The reward of thinking mid-training: 1 for a predicted continuation that agrees with the true one, else 0.

    prefix ──> <think> thought </think> predicted suffix ──> compared with the true suffix ──> 0 or 1

Experimental (paper, part two). A suffix may come in several chunks, each with a thought before it; all chunks together
are the prediction. Thoughts earn nothing by themselves: they are worth what the prediction is worth. An answer with
fewer thoughts than were asked for, without text after one, much shorter or much longer than the true suffix gets 0
unasked; the first two are counted as not parsed. Words beyond the length of the true suffix are not read. Prompts are
those of ``rlpt teacher thoughts``, whose labels hold prefix and true suffix. ``TrueContinuation`` asks the judge's
model; ``world.thinking`` decides the same exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from megatron_rlpt.config import GenerativeConfig
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Ask
from megatron_rlpt.teacher.judge import GroupJudge
from megatron_rlpt.teacher.pairwise import PairwiseJudge
from megatron_rlpt.teacher.right_verdict import NUMBERS, PARSED, answer_text
from megatron_rlpt.teacher.thinking import split_thoughts
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source, stable_id

NAME = "true_continuation"
VERSION = "2"
SHORTEST = 0.75
"""Least words of a prediction, as a share of those of the true suffix: a single sentence is right too easily."""
LONGEST = 1.5
"""Most words of a prediction: as nothing is read beyond the suffix, never to end would be how not to be short."""
_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Continued:
    """What a label knows: a piece of a document, and how many thoughts an answer has."""

    prefix: str
    suffix: str
    thoughts: int


@dataclass(frozen=True)
class Prediction:
    """An answer, taken apart."""

    thoughts: tuple[str, ...]
    text: str


Agreement = Callable[[Continued, Prediction], Awaitable[Reward | Failed]]
"""Compares a prediction that is as long as the true suffix, or little shorter, with it: 1 or 0, with details."""


async def reward_predictions(group: Group, text: TextTokens, agree: Agreement) -> Group:
    """Return the group with one reward per candidate.

    Args:
        group: answers to one prompt.
        text: text and tokens of the policy.
        agree: decides what the form of an answer does not.
    """
    known = continued_of(group.episode)
    if isinstance(known, Failed):
        return replace(group, rewards=(known,) * len(group.candidates))
    rewards = await gather_or_cancel(_reward(group.episode, one, known, text, agree) for one in group.candidates)
    return replace(group, rewards=tuple(rewards))


async def _reward(
    episode: Episode, candidate: Candidate, known: Continued, text: TextTokens, agree: Agreement
) -> Reward | Failed:
    found = read_prediction(answer_text(candidate, episode, text), known.thoughts)
    if isinstance(found, Failed):
        return Reward(0.0, NAME, VERSION, {PARSED: False, "verdict": found.reason})
    words, length = _WORD.findall(found.text), len(known.suffix.split())
    thought_words = sum(len(one.split()) for one in found.thoughts)
    detail: dict[str, Any] = {PARSED: True, NUMBERS: {"thought_words": thought_words, "words": len(words)}}
    if len(words) < SHORTEST * length:
        return Reward(0.0, NAME, VERSION, detail | {"verdict": "short"})
    if len(words) > LONGEST * length:
        return Reward(0.0, NAME, VERSION, detail | {"verdict": "long"})
    reward = await agree(known, replace(found, text="".join(words[:length])))
    if isinstance(reward, Failed):
        return reward
    numbers = detail[NUMBERS] | reward.detail.get(NUMBERS, {})
    return replace(reward, detail=reward.detail | detail | {NUMBERS: numbers})


def continued_of(episode: Episode) -> Continued | Failed:
    """Return what the label of a prompt knows; a failure if it is that of another kind of prompt."""
    label = json.loads(episode.label) if episode.label else {}
    prefix, suffix, thoughts = label.get("prefix"), label.get("suffix"), label.get("thoughts")
    if not (isinstance(prefix, str) and isinstance(suffix, str) and isinstance(thoughts, int)):
        return Failed(
            "label without prefix, suffix and thoughts; make the prompts with rlpt teacher thoughts",
            {"found": episode.label},
        )
    return Continued(prefix, suffix, thoughts)


def read_prediction(answer: str, thoughts: int) -> Prediction | Failed:
    """Take an answer apart.

    Args:
        answer: text without control tokens at its end.
        thoughts: how many it has, each before a part of the prediction; 0 if all of it is the prediction.
    """
    parts = split_thoughts(answer, thoughts) if thoughts else [("", answer)]
    if parts is None:
        return Failed("no end of the thought" if thoughts == 1 else "a thought is missing or has no end")
    if not all(text.strip() for _, text in parts):
        return Failed("no continuation")
    return Prediction(tuple(thought for thought, _ in parts) if thoughts else (), "".join(text for _, text in parts))


class TrueContinuation(GroupJudge):
    """Asks whether a prediction is as true as the suffix itself (prompt ``facts``, both orders): at least a tie.

    The true suffix is both the reference and the other option, so that a prediction that says less that is true loses.
    """

    def __init__(self, teacher: str, text: TextTokens, config: GenerativeConfig, seed: int) -> None:
        """
        Args:
            teacher: name of the model, stored with every reward.
            text: text and tokens of the policy.
            config: form of answers and sampling.
            seed: the run's seed.
        """
        self.name = f"{NAME}/{teacher}"
        self._text = text
        self._pairs = PairwiseJudge("facts", teacher, text, config, seed)

    @override
    async def judge_group(self, group: Group, ask: Ask) -> Group:
        async def agree(known: Continued, predicted: Prediction) -> Reward | Failed:
            judged = await self._pairs.judge_group(self._pair(known, predicted), ask)
            verdict = judged.rewards[0]
            if isinstance(verdict, Failed):
                return verdict
            return Reward(float(verdict.value >= 0.5), self.name, verdict.prompt_version, verdict.detail)

        return await reward_predictions(group, self._text, agree)

    def _pair(self, known: Continued, predicted: Prediction) -> Group:
        prefix = tuple(self._text.continue_with((), known.prefix))
        suffix, text = (tuple(self._text.continue_with(prefix, one)) for one in (known.suffix, predicted.text))
        identity = stable_id(NAME, known.prefix, known.suffix)
        episode = Episode(identity, prefix, suffix, "", identity, len(prefix))
        return Group(episode, (Candidate(Source.ROLLOUT, text), Candidate(Source.ORIGINAL, suffix)))
