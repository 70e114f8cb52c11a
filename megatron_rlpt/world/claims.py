"""What a text claims about the world, and what is true instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rlpt.world.discourse import Discourse
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import END, Sentence, Speech, sentences_of, text_of
from megatron_rlpt.world.phrases import Relation


@dataclass(frozen=True)
class Claim:
    """A sentence that the table of facts decides."""

    subject: str
    relation: Relation
    sentence: Sentence
    start: int
    """Where it begins in the text; negative if that is in the words before."""

    @property
    def value(self) -> str:
        """What it says of the subject, or denies."""
        return self.sentence.value

    @property
    def value_at(self) -> int:
        """Where ``value`` stands in the text."""
        return self.start + self.sentence.decided_at

    @property
    def negated(self) -> bool:
        """Whether it denies ``value``."""
        return self.sentence.form.negated


def claims_of(world: World, prefix: Sequence[str], text: Sequence[str]) -> Iterator[Claim]:
    """Yield every claim that the words of ``text`` make after those of ``prefix``, in order.

    None is made by a sentence that is cut off, or whose value the prefix has already.
    """
    discourse = Discourse.after(world, prefix)
    known = len(discourse.unfinished)
    line = [*discourse.unfinished, *text]
    for start, end in sentences_of(line):
        words = line[start:end]
        if words[-1] != END:
            break
        sentence = world.grammar.parse(words)
        if sentence is not None and sentence.decided_at >= known - start:
            relation, subject = sentence.form.relation, discourse.subject(sentence)
            if relation is not None and subject is not None:
                yield Claim(subject, relation, sentence, start - known)
        discourse.add(words, sentence)


def is_true(world: World, claim: Claim) -> bool:
    """Return whether a claim is true."""
    return world.is_true(claim.subject, claim.relation, claim.value, claim.negated)


def truth_of(world: World, claim: Claim) -> str:
    """Return what is true of the same subject, in the first phrasing of its relation, without a full stop.

    Of a false claim it says too what is not so: ``Zanar was founded by Babratra, not Mosi``.
    """
    relation, value = claim.relation, world.value(claim.subject, claim.relation)
    form = world.grammar.forms(Speech.fact, relation.kind, relation=relation)[0]
    truth = text_of(world.grammar.write(form, [claim.subject, value])[:-1])
    if is_true(world, claim):
        return truth
    return f"{truth}, {'which is denied' if claim.negated else f'not {claim.value}'}"
