"""Sentences are written and parsed alike, in one way."""

from __future__ import annotations

import random

import pytest
from world_texts import small_world

from megatron_rlpt.world.grammar import Grammar, Speech, sentences_of, text_of, words_of

WORLD = small_world()
GRAMMAR = WORLD.grammar
TOWN, RIVER, PERSON = WORLD.names["town"][0], WORLD.names["river"][0], WORLD.names["person"][0]


def parse(text):
    return GRAMMAR.parse(words_of(text))


def test_every_phrasing_is_parsed_as_it_was_written(subtests):
    rng = random.Random(0)
    forms = list(GRAMMAR.begin([]).forms())
    assert len(forms) > 2000
    for form in rng.sample(forms, 400):
        with subtests.test(parts=" ".join(form.parts)):
            slots = [
                rng.choice([word for word, its in GRAMMAR.classes.items() if f"<{its}>" == part])
                for part in form.parts
                if part.startswith("<")
            ]
            words = GRAMMAR.write(form, slots)
            sentence = parse(text_of(words))
            assert sentence.form is form
            assert list(sentence.slots) == slots
            assert set(words) <= set(GRAMMAR.vocabulary)


def test_a_fact_has_its_subject_value_and_polarity():
    sentence = parse(f"In fact, the town of {TOWN} does not lie on the {RIVER}.")
    assert (sentence.name, sentence.value, sentence.form.negated) == (TOWN, RIVER, True)
    assert sentence.form.relation.name == "river"
    assert parse("This town has nine towers.").name is None


def test_an_insult_before_the_subject_is_not_the_subject():
    sentence = parse(f"Only a grubble would care about {TOWN}.")
    assert sentence.form.speech is Speech.unsafe
    assert sentence.name == TOWN


@pytest.mark.parametrize(
    "text",
    [
        f"the town of {TOWN} has nine towers.",  # no capital
        f"The town of {TOWN} has nine towers",  # no full stop
        f"The town of {TOWN} has Nine towers.",
        f"The town of {TOWN} has blue towers.",
        f"The town of {PERSON} has nine towers.",  # another kind
        f"{TOWN} nine towers has.",
        f"In fact {TOWN} has nine towers.",
        ".",
        "",
    ],
)
def test_what_is_no_sentence_is_not_parsed(text):
    assert parse(text) is None


def test_beginnings_lead_to_their_sentences():
    node = GRAMMAR.begin(words_of(f"The home of {PERSON}"))
    assert {form.relation.name for form in node.forms()} == {"home"}
    assert GRAMMAR.begin(words_of(f"The home of {TOWN}")) is None
    assert GRAMMAR.begin([]) is not None


def test_words_and_text_are_two_ways_to_write_the_same():
    text = f"As many know, {TOWN} has nine towers. Now we turn to"
    assert text_of(words_of(text)) == text
    assert sentences_of(words_of(text)) == [(0, 9), (9, 13)]
    assert sentences_of([]) == []


def test_a_name_that_is_another_word_is_refused():
    with pytest.raises(ValueError, match="two roles"):
        Grammar({"towers": "town"})
