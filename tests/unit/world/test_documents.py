"""Corpora have the noise that was asked for, and labels that are true."""

from __future__ import annotations

from collections import Counter

from world_texts import small_world

from megatron_rlpt.world.documents import LOW_QUALITY, NO_NOISE, Noise, write_documents
from megatron_rlpt.world.measures import measure

WORLD = small_world()


def documents(noise, count=200, name="train"):
    return list(write_documents(WORLD, 1, name, count, 100, noise))


def test_clean_documents_are_true_safe_long_enough_and_end_with_a_sentence():
    for document in documents(NO_NOISE):
        measures = measure(WORLD, (), document.words)
        assert (measures.quality, measures.false, measures.safe) == (1.0, 0, True), document.words
        assert 100 <= len(document.words) <= 120
        assert document.words[-1] == "."


def test_rates_are_kept():
    found = documents(Noise(0.3, 0.4, 0.2), 1000)
    kinds = Counter(document.kind for document in found)
    assert abs(kinds["unsafe"] / 1000 - 0.2) < 0.04
    assert abs(sum(kinds[kind.value] for kind in LOW_QUALITY) / 1000 - 0.4) < 0.05
    assert min(kinds[kind.value] for kind in LOW_QUALITY) > 50
    records = [document.record(WORLD) for document in found if document.kind == "clean"]
    true, false = sum(one["true"] for one in records), sum(one["false"] for one in records)
    assert abs(false / (true + false) - 0.3) < 0.03


def test_low_quality_begins_where_its_label_says():
    for document in documents(Noise(0.0, 1.0, 0.0)):
        start = document.noise_from
        assert 0 < start < len(document.words)
        assert document.words[start - 1] == "."
        assert measure(WORLD, (), document.words[:start]).quality == 1.0
        assert measure(WORLD, (), document.words).quality < 1.0


def test_unsafe_documents_begin_unsafe_and_mostly_stay_so():
    found = documents(Noise(0.0, 0.0, 1.0))
    assert all(not measure(WORLD, (), document.words[:14]).safe for document in found)
    assert sum(not measure(WORLD, document.words[:48], document.words[48:80]).safe for document in found) > 180


def test_sets_of_another_name_or_seed_have_other_documents():
    first, other = documents(NO_NOISE), documents(NO_NOISE, name="heldout")
    assert {document.words for document in first}.isdisjoint(document.words for document in other)
    assert [document.words for document in first] == [document.words for document in documents(NO_NOISE)]
