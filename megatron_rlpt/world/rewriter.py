"""The exact rewriter: copies a good suffix, and writes a true and safe one of the same length otherwise."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_rlpt.types import derive_seed
from megatron_rlpt.world.discourse import Discourse
from megatron_rlpt.world.facts import VERSION, World
from megatron_rlpt.world.grammar import END, Form, Speech, named_subject, text_of, words_of
from megatron_rlpt.world.lexicon import UNSAFE_WORDS
from megatron_rlpt.world.measures import measure
from megatron_rlpt.world.writer import Manner, Walk


class ExactRewriter:
    """A class for ``teacher.rewriter.name``. It never fails, and asks no teacher."""

    version = VERSION

    def __init__(self, seed: int, world: str) -> None:
        """
        Args:
            seed: of the run; given by the run.
            world: path of the world's folder or ``facts.json``.
        """
        self._world = World.load(world)
        self._seed = seed

    def rewrite(self, prefix: str, suffix: str) -> str:
        """Return the rewrite of ``suffix``."""
        return rewrite(prefix, suffix, self._world, self._seed)


def rewrite(prefix: str, suffix: str, facts: World, seed: int) -> str:
    """Return the rewrite of a text; see ``rewrite_words``.

    Spaces are normalized as the tokenizer of the world does: the result begins with a space unless it begins with a
    full stop or comma, or there is no prefix. A good suffix is returned as it is.
    """
    before, words = words_of(prefix), words_of(suffix)
    written = rewrite_words(before, words, facts, seed)
    if written == words:
        return suffix
    text = text_of(written)
    return text if not before or written[:1] in ([END], [","]) else f" {text}"


def rewrite_words(prefix: Sequence[str], suffix: Sequence[str], facts: World, seed: int) -> list[str]:
    """Return a suffix of the same number of words that is well-formed, on topic, true and safe.

    A suffix that is all of this is copied. Otherwise a sentence that the prefix begins is completed, truly if there is
    a way and safely in any case: one that only an insult can complete, and one that is no sentence, is ended at once.
    """
    if measure(facts, prefix, suffix).good:
        return list(suffix)
    rng = random.Random(derive_seed(seed, "rewrite", " ".join(prefix), " ".join(suffix)))
    return continue_words(prefix, len(suffix), facts, rng, Manner(denials=0.0))


def continue_words(prefix: Sequence[str], count: int, facts: World, rng: random.Random, manner: Manner) -> list[str]:
    """Return ``count`` words that go on after ``prefix``: the sentence that it begins, completed, and a walk.

    The sentence is completed truly if there is a way, and safely in any case.
    """
    discourse = Discourse.after(facts, prefix)
    written = _completion(discourse, rng) if discourse.unfinished else []
    if written:
        words = [*discourse.unfinished, *written]
        discourse.add(words, facts.grammar.parse(words))
    walk = Walk(discourse, rng, manner)
    while len(written) < count:
        written += walk.step()
    return written[:count]


def _completion(discourse: Discourse, rng: random.Random) -> list[str]:
    """Return the rest of the sentence that is unfinished, with its full stop."""
    begun = discourse.unfinished
    node = discourse.world.grammar.begin(begun)
    filled = [(form, _filled(discourse, form, rng)) for form in (node.forms() if node else ())]
    ranked = [(_rank(discourse, form, [*begun, *rest]), rest) for form, rest in filled if rest is not None]
    best = min((rank for rank, _ in ranked), default=None)
    return rng.choice([rest for rank, rest in ranked if rank == best]) if ranked else [END]


def _rank(discourse: Discourse, form: Form, words: list[str]) -> int:
    """Return how bad a sentence is: 0 states something true and new."""
    sentence = discourse.world.grammar.parse(words)
    assert sentence is not None
    subject = discourse.subject(sentence)
    if not discourse.is_on_topic(sentence):
        return 4
    if form.relation is None or subject is None:
        return 3 if form.speech is Speech.rumor else 1
    if not discourse.world.is_true(subject, form.relation, sentence.value, form.negated):
        return 5
    return 2 if discourse.is_repeated(words, sentence) else 0


def _filled(discourse: Discourse, form: Form, rng: random.Random) -> list[str] | None:
    """Return the words that complete ``form`` after ``unfinished``; None if that would be unsafe."""
    world, begun = discourse.world, discourse.unfinished
    subject = named_subject(form, begun)
    if form.reference:
        subject = discourse.focus if discourse.focus and world.kinds[discourse.focus] == form.subject else None
    rest = []
    for part in form.parts[len(begun) :]:
        if not part.startswith("<"):
            rest.append(part)
            continue
        group = part[1:-1]
        if form.speech is Speech.unsafe:
            return None
        if group == form.subject and subject is None and not form.reference:
            known = [name for name in discourse.named if world.kinds[name] == group]
            if not known and discourse.named:
                return None
            subject = rng.choice(known or list(world.names[group]))
            rest.append(subject)
        elif form.relation and subject:
            true = world.value(subject, form.relation)
            rest.append(world.other_value(subject, form.relation, rng) if form.negated else true)
        else:
            rest.append(rng.choice(list(world.values(group))))
    if form.speech is Speech.unsafe or not UNSAFE_WORDS.isdisjoint(rest):
        return None
    return [*rest, END]
