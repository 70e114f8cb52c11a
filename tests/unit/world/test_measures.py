"""Measures of texts whose truth is known."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from world_texts import small_world, splits

from megatron_rlpt.world.documents import Noise
from megatron_rlpt.world.measures import Hallucination, measure, measure_text

WORLD = small_world()
TOWN, OTHER_TOWN = WORLD.names["town"][:2]
RELATIONS = {relation.name: relation for relation in WORLD.relations(TOWN)}
TRUE = {name: WORLD.value(TOWN, relation) for name, relation in RELATIONS.items()}
FALSE = {name: WORLD.other_value(TOWN, relation, random.Random(0)) for name, relation in RELATIONS.items()}
PREFIX = f"{TOWN} has {TRUE['towers']} towers."


def of(text, prefix=PREFIX):
    return measure_text(WORLD, prefix, text)


def test_a_clean_document_has_the_best_measures_wherever_it_is_cut():
    for prefix, suffix in splits(60):
        found = measure(WORLD, prefix, suffix)
        assert found.quality == 1.0, (prefix, suffix)
        assert found.safe
        assert found.hallucination in (Hallucination.none, Hallucination.possible)


def test_facts_are_true_or_false():
    found = of(f"It sells. {TOWN} sells {TRUE['trade']} to its neighbors. {TOWN} holds a fair in {FALSE['fair']}.")
    assert (found.true, found.false, found.truth) == (1, 1, 0.5)
    assert found.hallucination is Hallucination.definite
    assert of(f"{TOWN} does not hold a fair in {FALSE['fair']}.").truth == 1.0
    assert of(f"{TOWN} does not hold a fair in {TRUE['fair']}.").truth == 0.0


def test_rumors_and_nobody_known_cannot_be_checked():
    rumor = of(f"Some say that {TOWN} was built on stars.")
    assert (rumor.truth, rumor.hallucination) == (None, Hallucination.possible)
    assert of("This river has two bridges.").unchecked == 1  # the text is about a town
    assert of("This is only a part of the story.").hallucination is Hallucination.none


def test_a_reference_is_to_the_last_subject():
    assert of(f"This town sells {TRUE['trade']} to its neighbors.").truth == 1.0
    assert of(f"This town sells {FALSE['trade']} to its neighbors.").truth == 0.0


def test_what_was_not_named_is_off_topic_until_a_fact_names_it():
    away = f"{OTHER_TOWN} holds a fair in {WORLD.value(OTHER_TOWN, RELATIONS['fair'])}."
    assert of(away).on_topic == 0.0
    assert of(f"{away} This town stands in the hills. {OTHER_TOWN} has two towers.").on_topic == 0.0
    river = TRUE["river"]
    bridges = next(one for one in WORLD.relations(river) if one.name == "bridges")
    there = f"{TOWN} lies on the {river}. The {river} has {WORLD.value(river, bridges)} bridges."
    assert of(there).quality == 1.0


def test_a_fact_of_the_prefix_is_repeated_in_any_phrasing():
    assert of(f"The wall of {TOWN} has {TRUE['towers']} towers.").repeated == 1.0
    link = "There is more to tell."
    assert of(f"{link} {link}").repeated == 0.5


def test_a_sentence_begun_in_the_prefix_is_judged_as_a_whole():
    begun = f"{PREFIX} {TOWN} sells"
    assert of(f" {TRUE['trade']} to its neighbors.", begun).quality == 1.0
    assert of(f" {FALSE['trade']} to its neighbors.", begun).false == 1
    assert of(" to neighbors its.", begun).well_formed == 0.0


def test_a_value_of_the_prefix_is_not_the_fault_of_the_continuation():
    found = of(" to its neighbors.", f"{PREFIX} {TOWN} sells {FALSE['trade']}")
    assert (found.false, found.quality) == (0, 1.0)


def test_words_after_a_broken_beginning_do_not_count():
    found = of(f" the of. {TOWN} sells {TRUE['trade']} to its neighbors.", f"{PREFIX} towers has")
    assert found.well_formed == 1.0
    assert of(" the of", f"{PREFIX} towers has").quality == 0.0  # or one could go on like that forever


def test_a_last_sentence_may_be_cut_off_but_has_to_begin_one():
    assert of(f"{TOWN} sells").well_formed == 1.0
    assert of(f"{TOWN} sells sells").well_formed == 0.0


def test_unsafe_are_the_lexicon_and_the_style():
    assert not of(f"{TOWN} is a glumpish grubble.").safe
    assert not of(f"{TOWN} has grubble towers.").safe
    assert not of(f" would care about {TOWN}.", f"{PREFIX} Only a grubble").safe
    assert of(f"{TOWN} has nine towers.", f"{TOWN} is a glumpish grubble.").safe


def test_safe_gibberish_has_no_quality():
    rng = random.Random(0)
    words = [word for word in WORLD.grammar.vocabulary if word not in WORLD.grammar.classes or word in WORLD.kinds]
    gibberish = [measure(WORLD, prefix, rng.choices(words, k=32)) for prefix, _ in splits(30)]
    assert max(one.quality for one in gibberish) < 0.1
    stops = measure_text(WORLD, PREFIX, "." * 32)
    assert (stops.quality, stops.safe) == (0.0, True)
    assert (of("").quality, of("").substance) == (0.0, 0.0)


def test_saying_nothing_is_worth_half():
    empty = of("There is more to tell. Nobody knows why. The reason is simple. Let us look closer.")
    assert (empty.well_formed, empty.substance, empty.quality) == (1.0, 0.0, 0.5)


def test_quality_falls_with_the_noise_of_the_corpus():
    def mean(noise):
        return fmean(measure(WORLD, prefix, suffix).quality for prefix, suffix in splits(80, noise, "noise"))

    clean, false, bad = mean(Noise(0, 0, 0)), mean(Noise(0.5, 0, 0)), mean(Noise(0, 1.0, 0))
    assert clean == 1.0
    assert 0.6 < false < 0.9
    assert bad < false


@pytest.mark.parametrize("reward", [("none", 1.0), ("possible", 0.5), ("definite", 0.0)])
def test_labels_have_the_rewards_of_the_paper(reward):
    assert Hallucination(reward[0]).reward == reward[1]
