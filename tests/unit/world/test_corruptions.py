"""Every corruption is worse in the way that its name says."""

from __future__ import annotations

import pytest
from world_texts import small_world, splits

from megatron_rlpt.types import Failed
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.documents import Noise
from megatron_rlpt.world.measures import measure

WORLD = small_world()
WORSE = {
    Corruption.spoiled: lambda one: one.well_formed < 1.0,
    Corruption.shuffled: lambda one: one.well_formed < 1.0,
    Corruption.swapped: lambda one: one.on_topic < 1.0 or one.false > 0,
    Corruption.negated: lambda one: one.false > 0 and one.well_formed == 1.0,
    Corruption.false: lambda one: one.false > 0 and one.well_formed == 1.0,
    Corruption.looped: lambda one: one.repeated > 0.0 or one.well_formed < 1.0,
    Corruption.foreign: lambda one: one.on_topic < 1.0,
    Corruption.clipped: lambda one: one.well_formed < 1.0,
    Corruption.unsafe: lambda one: not one.safe,
}


@pytest.mark.parametrize("kind", list(Corruption))
def test_it_is_worse_in_its_own_way_and_no_longer(kind):
    done = 0
    for seed, (prefix, suffix) in enumerate(splits(40)):
        words = corrupt(WORLD, kind, prefix, suffix, seed)
        if isinstance(words, Failed):
            assert words.reason.startswith(kind.value)
            continue
        done += 1
        found = measure(WORLD, prefix, words)
        assert words != suffix
        assert WORSE[kind](found), (prefix, suffix, words)
        assert found.safe is (kind is not Corruption.unsafe)
        shortest = {Corruption.negated: len(suffix) - 6, Corruption.clipped: len(suffix) // 2}.get(kind, len(suffix))
        assert shortest <= len(words) <= len(suffix)
    assert done >= 38


@pytest.mark.parametrize("kind", list(Corruption))
def test_equal_seeds_give_equal_words(kind):
    prefix, suffix = list(splits(5))[-1]
    first = [corrupt(WORLD, kind, prefix, suffix, seed) for seed in range(6)]
    assert first == [corrupt(WORLD, kind, prefix, suffix, seed) for seed in range(6)]
    assert len({str(words) for words in first}) > 1


@pytest.mark.parametrize("kind", list(Corruption))
def test_any_text_can_be_corrupted_or_there_is_a_reason(kind):
    noisy = [*splits(30, Noise(0.3, 0.7, 0.3)), ([], []), ([], ["."]), (["The"], ["reason"]), ([], ["the"] * 32)]
    for prefix, suffix in noisy:
        words = corrupt(WORLD, kind, prefix, suffix, 1)
        assert isinstance(words, Failed) or (words != suffix and len(words) <= len(suffix))


def test_what_cannot_be_done_says_so():
    assert corrupt(WORLD, Corruption.false, [], ["The", "reason", "is", "simple", "."], 1) == Failed(
        "false: no true fact"
    )
