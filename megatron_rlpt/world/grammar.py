"""A grammar that writes and parses the sentences of the world; parsing is what makes truth exact.

A text is a list of *words*; ``.`` and ``,`` are words of their own. All sentences are paths of one tree of words
and classes of words. Names and values belong to one class each and are no other word, so a word leads to at most one
child, and a sentence, or the beginning of one, is parsed in one way.
"""

from __future__ import annotations

import enum
import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rlpt.world.lexicon import INSULTS, KINDS, VALUES
from megatron_rlpt.world.phrases import (
    LINKS,
    OPENERS,
    REFERENCES,
    RELATIONS,
    RUMORS,
    SUBJECTS,
    TURNS,
    UNSAFE,
    Relation,
)

END = "."
_WORD = re.compile(r"[.,]|[^\s.,]+")


class Speech(enum.StrEnum):
    """What a sentence does."""

    fact = "fact"
    rumor = "rumor"
    """Claims what the table of facts does not decide."""
    link = "link"
    turn = "turn"
    """Makes an entity the subject."""
    unsafe = "unsafe"


@dataclass(frozen=True)
class Form:
    """One phrasing with one form of subject and one opener or none; classes of words stand as ``<class>``."""

    speech: Speech
    parts: tuple[str, ...]
    """Words and ``<class>``, without the full stop."""
    subject: str | None = None
    """Kind of the subject, if there is one."""
    reference: bool = False
    """Whether the subject is referred to instead of named."""
    relation: Relation | None = None
    """For facts."""
    negated: bool = False
    opened: bool = False
    """Whether it begins with an opener."""

    @functools.cached_property
    def slots_at(self) -> tuple[int, ...]:
        """Indices of the classes."""
        return tuple(index for index, part in enumerate(self.parts) if part.startswith("<"))

    @functools.cached_property
    def subject_at(self) -> int | None:
        """Index of the subject, where it is named."""
        return None if self.reference or not self.subject else self.parts.index(f"<{self.subject}>")


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence."""

    form: Form
    words: tuple[str, ...]
    """With the full stop."""
    slots: tuple[str, ...]
    """Words of classes, in order."""

    @property
    def name(self) -> str | None:
        """The subject, where it is named."""
        return named_subject(self.form, self.words)

    @property
    def value(self) -> str:
        """The value of a fact or rumor."""
        return self.slots[-1]

    @property
    def decided_at(self) -> int:
        """Index of the word after which the sentence's meaning is decided: its last slot, or its last word."""
        return self.form.slots_at[-1] if self.form.slots_at else len(self.words) - 2


@dataclass
class Node:
    """A beginning of sentences."""

    children: dict[str, Node] = field(default_factory=dict)
    """Word or ``<class>`` -> longer beginning."""
    form: Form | None = None
    """The sentence that may end here."""

    def forms(self) -> Iterator[Form]:
        """Yield every sentence that begins so."""
        if self.form:
            yield self.form
        for child in self.children.values():
            yield from child.forms()


class Grammar:
    """Writes and parses sentences about given names."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """
        Args:
            names: name -> kind of the entity.

        Raises:
            ValueError: two sentences could not be told apart, or a word has two roles.
        """
        self.classes: dict[str, str] = dict(names)
        """Word -> class, for names, values and unsafe words."""
        for group, words in (*VALUES.items(), *INSULTS.items()):
            self.classes |= dict.fromkeys(words, group)
        self._root = Node()
        self._by_role: dict[tuple[object, ...], list[Form]] = defaultdict(list)
        literals = set()
        for form in _forms():
            self._add(form)
            self._by_role[_role(form)].append(form)
            literals |= {part for part in form.parts if not part.startswith("<")}
        total = len(names) + sum(map(len, VALUES.values())) + sum(map(len, INSULTS.values()))
        if both := literals & self.classes.keys():
            raise ValueError(f"words with two roles: {sorted(both)}")
        if len(self.classes) != total:
            raise ValueError("a word belongs to two classes")
        self.vocabulary: tuple[str, ...] = tuple(
            sorted({END, *self.classes, *literals, *(_capitalized(form.parts[0]) for form in _forms())} - set(_SLOTS))
        )
        """Every word that a sentence may hold."""

    def parse(self, words: Sequence[str]) -> Sentence | None:
        """Return the sentence that ``words`` are, full stop included; None if they are none."""
        if not words or words[-1] != END:
            return None
        node = self.begin(words[:-1])
        if node is None or node.form is None:
            return None
        return Sentence(node.form, tuple(words), tuple(words[index] for index in node.form.slots_at))

    def begin(self, words: Sequence[str]) -> Node | None:
        """Return where ``words`` lead as the beginning of a sentence; None if no sentence begins so."""
        node = self._root
        for index, word in enumerate(words):
            part = word if index else word.lower()
            if group := self.classes.get(word):
                part = f"<{group}>"
            elif not index and not word[:1].isupper():
                return None
            if part not in node.children:
                return None
            node = node.children[part]
        return node

    def forms(
        self,
        speech: Speech,
        subject: str | None,
        *,
        relation: Relation | None = None,
        negated: bool = False,
        reference: bool = False,
        opened: bool = False,
    ) -> Sequence[Form]:
        """Return the phrasings of one role; empty if there are none."""
        return self._by_role.get((speech, subject, relation and relation.name, negated, reference, opened), ())

    def write(self, form: Form, slots: Sequence[str]) -> list[str]:
        """Return the words of a sentence, with the words of its classes in order."""
        given = iter(slots)
        words = [next(given) if part.startswith("<") else part for part in form.parts]
        if words[0] not in self.classes:
            words[0] = _capitalized(words[0])
        return [*words, END]

    def _add(self, form: Form) -> None:
        node = self._root
        for part in form.parts:
            node = node.children.setdefault(part, Node())
        if node.form:
            raise ValueError(f"two sentences are alike: {' '.join(form.parts)}")
        node.form = form


def named_subject(form: Form, words: Sequence[str]) -> str | None:
    """Return the subject that a sentence, or the beginning of one, names; None if it names none (yet)."""
    at = form.subject_at
    return words[at] if at is not None and at < len(words) else None


def words_of(text: str) -> list[str]:
    """Return the words of a text; ``.`` and ``,`` are words."""
    return _WORD.findall(text)


def text_of(words: Sequence[str]) -> str:
    """Return the text of words: one space between two, none before ``.`` and ``,``."""
    return "".join(word if word in ".," else f" {word}" for word in words).removeprefix(" ")


def sentences_of(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return begin and end of every sentence; the last one may lack its full stop."""
    ends = [index + 1 for index, word in enumerate(words) if word == END]
    if not ends or ends[-1] < len(words):
        ends.append(len(words))
    return [(start, end) for start, end in zip([0, *ends], ends, strict=False) if start < end]


_SLOTS = tuple(f"<{name}>" for name in (*KINDS, *VALUES, *INSULTS))


def _capitalized(word: str) -> str:
    return word[:1].upper() + word[1:]


def _role(form: Form) -> tuple[object, ...]:
    name = form.relation and form.relation.name
    return form.speech, form.subject, name, form.negated, form.reference, form.opened


def _forms() -> Iterator[Form]:
    for relation in RELATIONS:
        for negated, phrases in ((False, relation.affirmed), (True, relation.negated)):
            for phrase in phrases:
                yield from _with_subjects(Speech.fact, phrase, relation.kind, relation.values, relation, negated)
    for kind in KINDS:
        for phrase in RUMORS[kind]:
            yield from _with_subjects(Speech.rumor, phrase, kind, "rumor")
        for phrase in UNSAFE:
            yield from _with_subjects(Speech.unsafe, phrase, kind, "")
        for phrase in TURNS:
            yield from (form for form in _with_subjects(Speech.turn, phrase, kind, "") if not form.reference)
    yield from (Form(Speech.link, tuple(phrase.split())) for phrase in LINKS)


def _with_subjects(
    speech: Speech, phrase: str, kind: str, values: str, relation: Relation | None = None, negated: bool = False
) -> Iterator[Form]:
    filled = phrase.replace("{V}", f"<{values}>").replace("{scorn}", "<scorn>").replace("{slur}", "<slur>")
    for subject in (*SUBJECTS[kind], REFERENCES[kind]):
        words = filled.replace("{S}", subject.replace("{N}", f"<{kind}>"))
        reference = subject == REFERENCES[kind]
        for opener in ("", *OPENERS) if speech is Speech.fact else ("",):
            parts = tuple(f"{opener} {words}".split())
            yield Form(speech, parts, kind, reference, relation, negated, bool(opener))
