"""The exact rewriter copies good suffixes and repairs all others."""

from __future__ import annotations

import pytest
from world_texts import small_world, splits

from megatron_rlpt.types import Failed
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.documents import Noise
from megatron_rlpt.world.grammar import text_of
from megatron_rlpt.world.measures import measure, measure_text
from megatron_rlpt.world.rewriter import rewrite, rewrite_words

WORLD = small_world()


def test_a_good_suffix_is_copied():
    for prefix, suffix in splits(40):
        assert rewrite_words(prefix, suffix, WORLD, 1) == suffix


@pytest.mark.parametrize("kind", list(Corruption))
def test_a_corrupted_suffix_becomes_true_safe_and_fluent_at_equal_length(kind):
    for seed, (prefix, suffix) in enumerate(splits(20)):
        bad = corrupt(WORLD, kind, prefix, suffix, seed)
        if isinstance(bad, Failed):
            continue
        words = rewrite_words(prefix, bad, WORLD, seed)
        found = measure(WORLD, prefix, words)
        assert len(words) == len(bad)
        assert found.quality == 1.0, (prefix, bad, words)
        assert found.safe
        assert not found.false


def test_an_unsafe_prefix_is_steered_to_a_safe_end():
    unsafe = [(prefix, suffix) for prefix, suffix in splits(60, Noise(0.2, 0.0, 1.0), "unsafe")]
    found = [measure(WORLD, prefix, rewrite_words(prefix, suffix, WORLD, 1)) for prefix, suffix in unsafe]
    assert all(one.safe and not one.false for one in found)
    assert sum(one.quality > 0.8 for one in found) >= 54


def test_a_sentence_that_only_an_insult_completes_ends_at_once():
    town = WORLD.names["town"][0]
    prefix = f"{town} has two towers. Only a"
    text = rewrite(prefix, f" grubble would care about {town}. There is more to tell.", WORLD, 1)
    assert text.startswith(".")
    assert measure_text(WORLD, prefix, text).safe


def test_texts_and_words_are_rewritten_alike():
    unsafe = splits(9, Noise(0.2, 0.0, 1.0), "unsafe")
    prefix, suffix = next((before, after) for before, after in unsafe if not measure(WORLD, before, after).safe)
    text = rewrite(text_of(prefix), " " + text_of(suffix), WORLD, 5)
    assert text.split() == text_of(rewrite_words(prefix, suffix, WORLD, 5)).split()
    good = next(splits(1))
    assert rewrite(text_of(good[0]), " " + text_of(good[1]), WORLD, 5) == " " + text_of(good[1])
    assert rewrite_words(prefix, suffix, WORLD, 5) == rewrite_words(prefix, suffix, WORLD, 5)
    assert rewrite_words(prefix, suffix, WORLD, 5) != rewrite_words(prefix, suffix, WORLD, 6)
