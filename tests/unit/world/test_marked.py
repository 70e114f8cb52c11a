"""Marked documents: a mark says exactly whether its sentence is right where it stands."""

import random
from collections import Counter

import pytest

from megatron_rlpt.world.corruptions import Corruption
from megatron_rlpt.world.facts import World, counts_of
from megatron_rlpt.world.grammar import words_of
from megatron_rlpt.world.marked import marked_document, write_marked
from megatron_rlpt.world.measures import measure


@pytest.fixture(scope="module")
def world():
    return World.make(3, counts_of(40))


@pytest.fixture(scope="module")
def documents(world):
    return [marked_document(world, random.Random(seed), 136) for seed in range(60)]


def test_every_flaw_occurs_and_about_as_many_sentences_are_right(documents):
    flaws = Counter(sentence.flaw for document in documents for sentence in document)
    assert flaws.keys() == {"", *(kind.value for kind in Corruption)}
    assert 0.3 < 1 - flaws[""] / flaws.total() < 0.5


def test_what_has_a_minus_is_worse_by_exact_measures(world, documents):
    worse = total = 0
    for document in documents:
        before: list[str] = []
        for sentence in document:
            found = measure(world, before, sentence.words)
            if sentence.flaw:
                total += 1
                worse += not found.safe or found.quality < 1.0 or bool(found.false)
            before += sentence.words
    assert worse / total > 0.9


def test_texts_are_sentences_with_marks(world):
    (identity, text), again = (
        next(write_marked(world, 1, "marked", 1, 60)),
        next(write_marked(world, 1, "marked", 1, 60)),
    )
    assert identity == "marked-0"
    assert (identity, text) == again
    marks = [piece[-1] for piece in text.split(". ")[:-1]]
    assert text.endswith((".+", ".-"))
    sentences = text.replace(".+", ".").replace(".-", ".")
    assert words_of(sentences).count(".") == text.count(".+") + text.count(".-") >= len(marks)
