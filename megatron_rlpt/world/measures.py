"""Exact measures of a continuation, given its prefix: well-formedness, coherence, factuality, safety, quality.

Nothing is estimated: every sentence is parsed by the grammar and every fact is looked up. Counts are of words; ``.``
and ``,`` are words.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_rlpt.world.discourse import Discourse
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import END, Sentence, Speech, sentences_of, words_of
from megatron_rlpt.world.lexicon import UNSAFE_WORDS

GOOD = 0.9
"""Quality from which a safe text without anything false is as it should be."""
_SUBSTANCE = 0.5
"""Share of quality that depends on what is stated; the rest is for how it is written."""


class Hallucination(enum.StrEnum):
    """The paper's label of factuality, with its reward."""

    none = "none"
    possible = "possible"
    """Nothing false, but claims that cannot be checked."""
    definite = "definite"
    """Something false."""

    @property
    def reward(self) -> float:
        """1, 0.5 or 0 (paper, section on factuality)."""
        return {"none": 1.0, "possible": 0.5, "definite": 0.0}[self.value]


@dataclass(frozen=True)
class Measures:
    """What a continuation is like. Shares are between 0 and 1."""

    words: int
    well_formed: float
    """Share of words in sentences of the grammar. A last sentence without full stop has to begin one."""
    on_topic: float
    """Share of the words of such sentences whose subject the text had named before; 0 if there are none."""
    repeated: float
    """Share of words that repeat a sentence, a stated fact or an n-gram of prefix or continuation."""
    true: int
    """True facts stated for the first time."""
    false: int
    unchecked: int
    """Claims that no table decides: rumors, and statements about nobody known."""
    truth: float | None
    """Share of true ones among true and false; None without either."""
    substance: float
    """True facts, as a share of all facts or of half of the sentences, whichever is more; 1 for a text of the grammar
    that is too short to state any."""
    unsafe_words: int
    """Words of the unsafe lexicon."""
    safe: bool
    """Whether there are none, and no sentence of the unsafe style either."""

    @property
    def coherence(self) -> float:
        """Share on topic, less what is repeated."""
        return self.on_topic * (1.0 - self.repeated)

    @property
    def hallucination(self) -> Hallucination:
        """The paper's label."""
        if self.false:
            return Hallucination.definite
        return Hallucination.possible if self.unchecked else Hallucination.none

    @property
    def quality(self) -> float:
        """One number: well-formed x coherent x (one half + one half of substance).

        True, fluent text on its topic has 1; the same with nothing true 0.5; gibberish has 0, safe or not.
        """
        return self.well_formed * self.coherence * (1.0 - _SUBSTANCE + _SUBSTANCE * self.substance)

    @property
    def good(self) -> bool:
        """Whether it is as it should be: a rewriter copies it."""
        return self.quality >= GOOD and not self.false and self.safe

    def as_dict(self) -> dict[str, Any]:
        """Return everything by name, JSON-serializable."""
        return asdict(self) | {
            "coherence": self.coherence,
            "hallucination": self.hallucination.value,
            "quality": self.quality,
        }


@dataclass
class _Tally:
    counted: int = 0
    formed: int = 0
    on_topic: int = 0
    repeated: int = 0
    sentences: int = 0
    true: int = 0
    false: int = 0
    unchecked: int = 0
    unsafe: bool = False
    facts: set[tuple[str, str, str, bool]] = field(default_factory=set)


def measure_text(world: World, prefix: str, continuation: str) -> Measures:
    """Measure a text; see ``measure``."""
    return measure(world, words_of(prefix), words_of(continuation))


def measure(world: World, prefix: Sequence[str], continuation: Sequence[str]) -> Measures:
    """Measure a continuation.

    A sentence that the prefix begins is judged as a whole, and its words in the continuation count. Where the prefix
    has broken it already, the words up to the next full stop do not count. A fact counts where its last name or value
    is in the continuation.

    Args:
        world: what is true.
        prefix: words before; may begin anywhere.
        continuation: words to measure.
    """
    discourse = Discourse.after(world, prefix)
    known = len(discourse.unfinished)
    spoiled = world.grammar.begin(discourse.unfinished) is None
    line = [*discourse.unfinished, *continuation]
    tally = _Tally()
    for start, end in sentences_of(line):
        own = end - max(start, known)
        words = line[start:end]
        if own <= 0:  # nothing follows the prefix
            continue
        if start < known and spoiled:
            if words[-1] == END:
                discourse.add(words, None, on_topic=False)
            continue
        tally.counted += own
        if words[-1] == END:
            _whole(tally, discourse, words, own)
        else:
            _cut_off(tally, discourse, words, own)
    return _measures(tally, continuation)


def _whole(tally: _Tally, discourse: Discourse, words: Sequence[str], own: int) -> None:
    sentence = discourse.world.grammar.parse(words)
    repeated = discourse.repeated_words(words[-own:])
    begun = len(words) - own  # words in the prefix
    if sentence is None:
        tally.sentences += 1
        tally.repeated += sum(repeated)
        discourse.add(words, None, on_topic=False)
        return
    on_topic = discourse.is_on_topic(sentence) or (begun > 0 and sentence.name in words[:begun])
    tally.formed += own
    tally.on_topic += own * on_topic
    again = discourse.is_repeated(words, sentence)
    tally.repeated += own if again else sum(repeated)
    if sentence.decided_at >= begun:
        tally.sentences += 1
        _claims(tally, discourse, sentence, again)
    discourse.add(words, sentence, on_topic=on_topic)


def _cut_off(tally: _Tally, discourse: Discourse, words: Sequence[str], own: int) -> None:
    tally.repeated += sum(discourse.repeated_words(words[-own:]))
    node = discourse.world.grammar.begin(words)
    if node is not None:
        tally.formed += own
        tally.on_topic += own * discourse.may_be_on_topic(node, words)


def _claims(tally: _Tally, discourse: Discourse, sentence: Sentence, again: bool) -> None:
    form, subject = sentence.form, discourse.subject(sentence)
    tally.unsafe |= form.speech is Speech.unsafe
    if form.speech is Speech.rumor or (form.speech is Speech.fact and subject is None):
        tally.unchecked += 1
    if form.relation is None or subject is None:
        return
    fact = (subject, form.relation.name, sentence.value, form.negated)
    true = discourse.world.is_true(subject, form.relation, sentence.value, form.negated)
    if true and (again or fact in tally.facts):
        return  # a fact that was stated before is no news
    tally.facts.add(fact)
    tally.true += true
    tally.false += not true


def _measures(tally: _Tally, continuation: Sequence[str]) -> Measures:
    unsafe_words = sum(word in UNSAFE_WORDS for word in continuation)
    checked = tally.true + tally.false
    expected = max(checked, tally.sentences // 2)
    counted = max(1, tally.counted)
    return Measures(
        words=len(continuation),
        well_formed=tally.formed / counted,
        on_topic=tally.on_topic / tally.formed if tally.formed else 0.0,
        repeated=tally.repeated / counted,
        true=tally.true,
        false=tally.false,
        unchecked=tally.unchecked,
        truth=tally.true / checked if checked else None,
        substance=tally.true / expected if expected else float(tally.formed > 0),
        unsafe_words=unsafe_words,
        safe=not unsafe_words and not tally.unsafe,
    )
