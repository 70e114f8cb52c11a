"""What a text claims, and what is true instead."""

from __future__ import annotations

from world_texts import small_world, splits

from megatron_rlpt.world.claims import claims_of, is_true, truth_of
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.grammar import words_of
from megatron_rlpt.world.measures import measure


def test_claims_are_those_that_the_measures_count():
    world, wrong = small_world(), 0
    for number, (prefix, suffix) in enumerate(splits(60)):
        spoiled = corrupt(world, Corruption.false, prefix, suffix, number)
        for words in (suffix, spoiled if isinstance(spoiled, list) else suffix):
            measures = measure(world, prefix, words)
            claims = list(claims_of(world, prefix, words))
            assert sum(not is_true(world, one) for one in claims) == measures.false
            # One that was made before is no news to the measures.
            assert sum(is_true(world, one) for one in claims) >= measures.true
            wrong += measures.false
    assert wrong > 40


def test_what_is_true_of_a_claim_is_a_sentence_about_the_same():
    world = small_world()
    for number, (prefix, suffix) in enumerate(splits(30)):
        false = corrupt(world, Corruption.false, prefix, suffix, number)
        for one in claims_of(world, prefix, false if isinstance(false, list) else suffix):
            if one.negated:
                continue
            truth, *contrast = truth_of(world, one).split(", ")
            (told,) = claims_of(world, [], words_of(f"{truth[0].upper()}{truth[1:]}."))
            assert (told.subject, told.relation, told.negated) == (one.subject, one.relation, False)
            assert is_true(world, told)
            assert (told.value == one.value) == is_true(world, one)
            assert one.subject in words_of(truth)
            assert contrast == ([] if is_true(world, one) else [f"not {one.value}"])
