"""What a text has said so far: its topics, its facts and its words, which the next sentence is judged by."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import END, Form, Node, Sentence, named_subject, sentences_of

NGRAM = 6
"""Words of an n-gram whose repetition counts."""


class Discourse:
    """Follows a text sentence by sentence."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.named: dict[str, None] = {}
        """Entities that may be talked about, in the order in which they were last named."""
        self.focus: str | None = None
        """Subject of the last sentence that had one; ``this town`` refers to it."""
        self.said: set[tuple[str, str]] = set()
        """(Subject, relation) of the facts stated."""
        self.unfinished: list[str] = []
        """Words after the last full stop."""
        self.last: Sentence | None = None
        """The last sentence, if it could be parsed."""
        self.words: list[str] = []
        self._sentences: set[tuple[str, ...]] = set()
        self._ngrams: set[tuple[str, ...]] = set()

    @classmethod
    def after(cls, world: World, prefix: Sequence[str]) -> Discourse:
        """Read a prefix. Every entity in it may be talked about, however well it is written."""
        discourse = cls(world)
        for start, end in sentences_of(prefix):
            words = prefix[start:end]
            if words[-1] == END:
                discourse.add(words, discourse.world.grammar.parse(words))
            else:
                discourse.unfinished = list(words)
                discourse._name(words)
        discourse._remember(discourse.unfinished)
        return discourse

    def add(self, words: Sequence[str], sentence: Sentence | None, *, on_topic: bool = True) -> None:
        """Append a sentence with its full stop, which may begin with ``unfinished``.

        Args:
            words: the sentence.
            sentence: the same, parsed; None if it is none.
            on_topic: whether its entities may be talked about from now on.
        """
        known = len(self.unfinished)
        self.last, self.unfinished = sentence, []
        self._remember(words[known:])
        if on_topic:
            self._name(words)
        if sentence is None:
            return
        self._sentences.add(tuple(words))
        subject = self.subject(sentence)
        if sentence.form.subject:
            self.focus = subject
        if subject and sentence.form.relation:
            self.said.add((subject, sentence.form.relation.name))

    def subject(self, sentence: Sentence) -> str | None:
        """Return the subject, resolved where it is referred to; None if there is none, or nothing to refer to."""
        return self._subject(sentence.form, sentence.words)

    def is_on_topic(self, sentence: Sentence) -> bool:
        """Return whether a sentence has no subject, or one that has been named (anything, if nothing has been)."""
        subject = self.subject(sentence)
        return not sentence.form.subject or (subject is not None and self._known(subject))

    def may_be_on_topic(self, node: Node, words: Sequence[str]) -> bool:
        """Return whether the beginning of a sentence can still become one that is on topic."""
        form = next(node.forms())
        subject = named_subject(form, words)
        if subject:
            return self._known(subject)
        return any(
            self.focus is not None and self.world.kinds[self.focus] == form.subject
            if form.reference
            else form.subject is None or any(self._known(name) for name in self.world.names[form.subject])
            for form in node.forms()
        )

    def is_repeated(self, words: Sequence[str], sentence: Sentence | None) -> bool:
        """Return whether a sentence, or what it states, has been said before."""
        if sentence is None:
            return False
        if tuple(words) in self._sentences:
            return True
        relation = sentence.form.relation
        return relation is not None and (self.subject(sentence), relation.name) in self.said

    def repeated_words(self, words: Sequence[str]) -> list[bool]:
        """Return for every word whether it completes an n-gram (``NGRAM``) that was there before."""
        line = (*self.words[-(NGRAM - 1) :], *words)
        ngrams = [line[end - NGRAM : end] for end in range(NGRAM, len(line) + 1)]
        known, seen, found = self._ngrams, set[tuple[str, ...]](), [False] * (len(words) - len(ngrams))
        for ngram in ngrams:
            found.append(ngram in known or ngram in seen)
            seen.add(ngram)
        return found

    def _subject(self, form: Form, words: Sequence[str]) -> str | None:
        if form.reference:
            return self.focus if self.focus and self.world.kinds[self.focus] == form.subject else None
        return named_subject(form, words)

    def _known(self, name: str) -> bool:
        return not self.named or name in self.named

    def _name(self, words: Sequence[str]) -> None:
        for word in words:
            if word in self.world.kinds:
                self.named.pop(word, None)
                self.named[word] = None

    def _remember(self, words: Sequence[str]) -> None:
        line = (*self.words[-(NGRAM - 1) :], *words)
        self._ngrams.update(line[end - NGRAM : end] for end in range(NGRAM, len(line) + 1))
        self.words += words
