"""Spoil a text in a known way: labelled examples for judges, and the noise of the corpus."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Mapping, Sequence

from megatron_rlpt.types import Failed, derive_seed
from megatron_rlpt.world.claims import Claim, claims_of, is_true
from megatron_rlpt.world.discourse import Discourse
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import END, sentences_of
from megatron_rlpt.world.lexicon import UNSAFE_WORDS
from megatron_rlpt.world.measures import measure
from megatron_rlpt.world.writer import Manner, Walk

_SPOILED = 0.2
"""Share of words that are replaced."""
_TRIES = 20


class Corruption(enum.StrEnum):
    """What is done to a text."""

    spoiled = "spoiled"
    """Some words are replaced by random ones."""
    shuffled = "shuffled"
    """The words of every sentence are shuffled."""
    swapped = "swapped"
    """An entity becomes another one of its kind, which the text does not name."""
    negated = "negated"
    """A true fact is denied, or a true denial affirmed."""
    false = "false"
    """A true fact gets a value that is not true."""
    looped = "looped"
    """The beginning repeats itself."""
    foreign = "foreign"
    """The text goes on about something else."""
    clipped = "clipped"
    """Sentences break off."""
    unsafe = "unsafe"
    """Sentences of the unsafe style are added."""


def corrupt(
    world: World, kind: Corruption, prefix: Sequence[str], suffix: Sequence[str], seed: int
) -> list[str] | Failed:
    """Return ``suffix`` corrupted: never equal to it, never longer, and worse by exact measures if that is possible.

    The length is kept, except by ``clipped`` (at least half) and ``negated`` (up to three words less).

    Args:
        world: what is true.
        kind: what to do.
        prefix: words before.
        suffix: words to corrupt.
        seed: equal arguments give equal results.

    Returns:
        Words, or why this suffix cannot be corrupted so.
    """
    rng = random.Random(derive_seed(seed, "corrupt", kind.value, " ".join(prefix), " ".join(suffix)))
    before = _goodness(world, prefix, suffix)
    changed: list[str] | None = None
    for _ in range(_TRIES):
        words = _CORRUPT[kind](world, list(prefix), list(suffix), rng)
        if isinstance(words, Failed):
            return words
        words = words[: len(suffix)]
        if words != list(suffix):
            if _goodness(world, prefix, words) < before:
                return words
            changed = words
    return changed or Failed(f"{kind.value}: nothing to change")


def insulted(world: World, prefix: Sequence[str], seed: int) -> list[str]:
    """Return a beginning as an unsafe document has one: sentences of the unsafe style stand between its own.

    It is longer, and ends as it did, so that whatever followed still follows.
    """
    rng = random.Random(derive_seed(seed, "insulted", " ".join(prefix)))
    return _insulted(world, [], list(prefix), rng)


def _goodness(world: World, prefix: Sequence[str], words: Sequence[str]) -> tuple[bool, float]:
    measures = measure(world, prefix, words)
    return measures.safe, measures.quality


def _spoiled(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    if not suffix:
        return Failed("spoiled: no words")
    pool = [word for word in world.grammar.vocabulary if word not in UNSAFE_WORDS]
    words = list(suffix)
    for index in rng.sample(range(len(words)), max(1, round(_SPOILED * len(words)))):
        words[index] = rng.choice(pool)
    return words


def _shuffled(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    words = []
    for start, end in sentences_of(suffix):
        stop = end - (suffix[end - 1] == END)
        words += rng.sample(suffix[start:stop], stop - start) + suffix[stop:end]
    return words


def _swapped(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    begun = Discourse.after(world, prefix).unfinished
    line = [*begun, *suffix]
    parsed = [world.grammar.parse(line[start:end]) for start, end in sentences_of(line)]
    subjects = [sentence.name for sentence in parsed if sentence and sentence.name in suffix]
    named = [word for word in suffix if word in world.kinds]
    if not named:
        return Failed("swapped: no entity is named")
    old = rng.choice([name for name in subjects if name] or named)
    pool = [name for name in world.names[world.kinds[old]] if name not in {*prefix, *suffix}]
    if not pool:
        return Failed("swapped: every entity of the kind is named")
    new = rng.choice(pool)
    return [new if word == old else word for word in suffix]


def _negated(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    found = []
    for claim in _true_claims(world, prefix, suffix):
        form = claim.sentence.form
        forms = world.grammar.forms(
            form.speech,
            form.subject,
            relation=form.relation,
            negated=not form.negated,
            reference=form.reference,
            opened=form.opened,
        )
        written = [world.grammar.write(other, claim.sentence.slots) for other in forms]
        found += [(claim, words) for words in written if 0 <= claim.start <= len(suffix) - len(words)]
    if not found:
        return Failed("negated: no true fact that would fit")
    claim, words = rng.choice(found)
    return [*suffix[: claim.start], *words, *suffix[claim.start + len(claim.sentence.words) :]]


def _false(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    true = _true_claims(world, prefix, suffix)
    if not true:
        return Failed("false: no true fact")
    claim = rng.choice(true)
    subject, relation = claim.subject, claim.relation
    words = list(suffix)
    words[claim.value_at] = (
        world.value(subject, relation) if claim.negated else world.other_value(subject, relation, rng)
    )
    return words


def _looped(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    if len(suffix) < 2:
        return Failed("looped: fewer than two words")
    half = len(suffix) // 2
    ends = [end for _, end in sentences_of(suffix) if suffix[end - 1] == END and end <= half]
    begun = Discourse.after(world, prefix).unfinished
    starts = [0, *ends] if not begun or not ends else ends
    loops = [(start, end) for start in starts for end in ends if start < end]
    loops.append((0, rng.randint(1, half)))  # and one that does not end with a sentence
    start, end = rng.choice(loops)
    return [*suffix[:start], *suffix[start:end] * (len(suffix) // (end - start) + 1)]


def _foreign(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    named = {word for word in (*prefix, *suffix) if word in world.kinds}
    others = [name for name in world.kinds if name not in named]
    if not others:
        return Failed("foreign: every entity is named")
    kept: list[str] = []
    if Discourse.after(world, prefix).unfinished:
        kept = suffix[: next((end for _, end in sentences_of(suffix)), 0)]
        if len(kept) == len(suffix):
            kept = []
    discourse = Discourse(world)
    discourse.named[rng.choice(others)] = None
    return [*kept, *(word for one in Walk(discourse, rng, Manner()).until(len(suffix)) for word in one)]


def _clipped(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    words: list[str] = []
    for start, end in sentences_of(suffix):
        sentence = suffix[start:end]
        kept = sentence[: max(1, len(sentence) - 1 - rng.randint(0, 2))]
        words += kept if sentence[-1] == END and len(kept) * 2 >= len(sentence) else sentence
    return words


def _unsafe(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str] | Failed:
    words = _insulted(world, prefix, suffix, rng)[: len(suffix)]
    if UNSAFE_WORDS.isdisjoint(words):  # no sentence ends in time
        if not suffix:
            return Failed("unsafe: no words")
        words[rng.randrange(len(words))] = rng.choice(sorted(UNSAFE_WORDS))
    return words


def _insulted(world: World, prefix: list[str], suffix: list[str], rng: random.Random) -> list[str]:
    """Return ``suffix`` with sentences of the unsafe style between its own, which makes it longer."""
    discourse = Discourse.after(world, prefix)
    kept = len(discourse.unfinished)
    line = [*discourse.unfinished, *suffix]
    words: list[str] = []
    added = 0
    for start, end in sentences_of(line):
        sentence = line[start:end]
        if not (start == 0 and kept) and discourse.named and (not added or rng.random() < 0.4):
            words += Walk(discourse, rng, Manner(unsafe=1.0)).step()
            added += 1
        words += sentence
        if sentence[-1] == END:
            discourse.add(sentence, world.grammar.parse(sentence))
    return words[kept:]


def _true_claims(world: World, prefix: list[str], suffix: list[str]) -> list[Claim]:
    return [claim for claim in claims_of(world, prefix, suffix) if is_true(world, claim)]


_CORRUPT: Mapping[Corruption, Callable[[World, list[str], list[str], random.Random], list[str] | Failed]] = {
    Corruption.spoiled: _spoiled,
    Corruption.shuffled: _shuffled,
    Corruption.swapped: _swapped,
    Corruption.negated: _negated,
    Corruption.false: _false,
    Corruption.looped: _looped,
    Corruption.foreign: _foreign,
    Corruption.clipped: _clipped,
    Corruption.unsafe: _unsafe,
}
