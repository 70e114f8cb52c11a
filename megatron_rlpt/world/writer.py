"""Writes text about the world: a walk from entity to entity, one sentence at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlpt.world.discourse import Discourse
from megatron_rlpt.world.grammar import Sentence, Speech
from megatron_rlpt.world.lexicon import INSULTS
from megatron_rlpt.world.phrases import Relation

_TRIES = 40
"""Phrasings to try before something else is said."""


@dataclass(frozen=True)
class Manner:
    """How a text is written. Rates are probabilities per sentence."""

    false_facts: float = 0.0
    """Of stated facts that are false."""
    denials: float = 0.06
    """Of facts stated as what is not so; they are true unless they are false facts."""
    asides: float = 0.35
    """Of sentences after a fact that state none: links, turns and rumors."""
    unsafe: float = 0.0
    """Of sentences in the unsafe style."""


class Walk:
    """Continues a text: some facts about its subject, the last of which names the next subject, and so on.

    Sentences that state no fact never follow each other (except unsafe ones), no fact is stated twice, and no n-gram
    occurs twice, so that a walk with neither false facts nor unsafe sentences has the best measures there are.
    """

    def __init__(self, discourse: Discourse, rng: random.Random, manner: Manner) -> None:
        """
        Args:
            discourse: the text so far; grows with every step.
            rng: draws everything.
            manner: how to write.
        """
        self.discourse = discourse
        self._world = discourse.world
        self._rng = rng
        self._manner = manner
        self._plan: list[Relation] = []
        self._subject: str | None = None

    def step(self) -> list[str]:
        """Append one sentence and return its words."""
        manner, last = self._manner, self.discourse.last
        after_fact = last is not None and last.form.speech is Speech.fact
        if manner.unsafe and (not self.discourse.words or self._rng.random() < manner.unsafe):
            self._choose_subject()
            return self._say(Speech.unsafe)
        turned = self._choose_subject()
        if (after_fact or not self.discourse.words) and self._rng.random() < (0.5 if turned else manner.asides):
            kind = Speech.turn if turned else self._rng.choice((Speech.link, Speech.link, Speech.rumor))
            return self._say(kind)
        return self._fact()

    def until(self, words: int) -> list[list[str]]:
        """Return sentences with at least ``words`` words in all."""
        found: list[list[str]] = []
        count = 0
        while count < words:
            found.append(self.step())
            count += len(found[-1])
        return found

    def _choose_subject(self) -> bool:
        """Choose whom to speak about and what to say, unless something is left to say; return whether it is new."""
        if self._plan and self._subject == self.discourse.focus:
            return False
        if self._plan:  # the last sentence was about somebody else
            self._plan = []
        before, world = self.discourse.focus, self._world
        named = list(reversed(self.discourse.named))
        left = [name for least in (3, 1) for name in named if len(self._unsaid(name)) >= least]
        latest = next(iter(left), None)
        if before in left and self._subject is None:
            latest = before  # a text that others began: go on with its subject
        self._subject = latest or self._rng.choice([n for n in world.kinds if n not in self.discourse.named])
        unsaid = list(self._unsaid(self._subject))
        self._rng.shuffle(unsaid)
        onward = [one for one in unsaid if one.values in world.names]
        unsaid = [one for one in unsaid if one not in onward[:1]][: self._rng.choice((2, 3, 4))]
        self._plan = [*unsaid, *onward[:1]]
        return self._subject != before

    def _unsaid(self, name: str) -> Sequence[Relation]:
        return [one for one in self._world.relations(name) if (name, one.name) not in self.discourse.said]

    def _fact(self) -> list[str]:
        assert self._subject is not None
        relation = self._plan.pop(0)
        false = self._rng.random() < self._manner.false_facts
        negated = self._rng.random() < self._manner.denials
        true_value = self._world.value(self._subject, relation)
        value = true_value if false == negated else self._world.other_value(self._subject, relation, self._rng)
        return self._say(Speech.fact, relation, value, negated)

    def _say(
        self, speech: Speech, relation: Relation | None = None, value: str = "", negated: bool = False
    ) -> list[str]:
        """Append a sentence that repeats no n-gram, if the phrasings allow it."""
        words: list[str] = []
        for _ in range(_TRIES):
            words = self._phrase(speech, relation, value, negated)
            sentence = self._world.grammar.parse(words)
            assert sentence is not None, words
            if not self.discourse.is_repeated(words, sentence) and not any(self.discourse.repeated_words(words)):
                return self._append(words, sentence)
        if speech is Speech.fact:
            return self._append(words, self._world.grammar.parse(words))
        return self._fact() if self._plan else self.step()

    def _phrase(self, speech: Speech, relation: Relation | None, value: str, negated: bool) -> list[str]:
        subject = None if speech is Speech.link else self._subject
        kind = subject and self._world.kinds[subject]
        referable = speech is not Speech.turn and subject is not None and subject == self.discourse.focus
        reference = referable and self._rng.random() < 0.35
        opened = speech is Speech.fact and self._rng.random() < 0.25
        forms = self._world.grammar.forms(
            speech, kind, relation=relation, negated=negated, reference=reference, opened=opened
        )
        form = self._rng.choice(forms)
        if speech is Speech.rumor:
            value = self._rng.choice(self._world.values("rumor"))
        slots = []
        for part in (part for part in form.parts if part.startswith("<")):
            group = part[1:-1]
            if group in INSULTS:
                slots.append(self._rng.choice(INSULTS[group]))
            elif group == kind and not reference and subject not in slots:
                assert subject is not None
                slots.append(subject)
            else:
                slots.append(value)
        return self._world.grammar.write(form, slots)

    def _append(self, words: list[str], sentence: Sentence | None) -> list[str]:
        self.discourse.add(words, sentence)
        return words
