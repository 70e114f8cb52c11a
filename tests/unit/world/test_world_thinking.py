"""Thinking in the world: plans are what a suffix states, and predictions are right by what they state themselves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from text_tokens import FakeText
from world_texts import small_world, splits

from megatron_rlpt.types import Candidate, Episode, Group, Source
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.grammar import text_of, words_of
from megatron_rlpt.world.measures import measure
from megatron_rlpt.world.phrases import RELATIONS
from megatron_rlpt.world.thinking import ExactContinuation, plan_of, verdict_of

NAMES = {relation.name for relation in RELATIONS}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "facts.json"
    small_world().save(path)
    return ExactContinuation(FakeText(), str(path))


def rewards(judge, prefix, suffix, *answers, thoughts=1):
    label = {"prefix": text_of(prefix), "suffix": text_of(suffix), "thoughts": thoughts}
    candidates = tuple(Candidate(Source.ROLLOUT, tuple(map(ord, one))) for one in answers)
    group = Group(Episode("e", (1,), (), "c", "d", 1, json.dumps(label)), candidates)
    return asyncio.run(judge.judge_group(group, None)).rewards


def test_a_plan_has_the_true_value_of_every_fact_that_the_suffix_states():
    world, planned, whole = small_world(), 0, 0
    for prefix, suffix in splits(60):
        facts = [
            sentence.split() for sentence in plan_of(world, text_of(prefix), text_of(suffix)).split(".") if sentence
        ]
        for subject, relation, value, *denied in facts:
            one = next(one for one in world.relations(subject) if one.name == relation)
            assert world.value(subject, one) == value
            assert not denied or (denied[0] == "not" and denied[1] in suffix and denied[1] != value)
            assert denied or value in suffix
        # The writer never states a fact twice, so the measures count the same facts; a last sentence may be cut off.
        assert len(facts) == measure(world, prefix, suffix).true
        planned, whole = planned + len(facts), whole + bool(facts)
    assert whole > 55
    assert planned > 120


def test_a_value_in_the_prefix_is_not_planned():
    world = small_world()
    town = world.names["town"][0]
    founder, fair = (world.value(town, one) for one in world.relations(town) if one.name in ("founder", "fair"))
    assert plan_of(world, f"{town} was founded by", f" {founder}. This town holds a fair in {fair}.") == (
        f"{town} founder {founder}. {town} fair {fair}."
    )
    assert plan_of(world, f"{town} was founded by {founder}", f". This town holds a fair in {fair}.") == (
        f"{town} fair {fair}."
    )


@pytest.mark.parametrize("thoughts", [1, 0])
def test_the_true_suffix_is_right_and_a_spoiled_one_is_not(judge, thoughts):
    world, thought = small_world(), "<think> so </think> " if thoughts else " "
    right = wrong = 0
    for number, (prefix, suffix) in enumerate(splits(20)):
        if not measure(world, prefix, suffix).good:
            continue
        spoiled = [corrupt(world, kind, prefix, suffix, number) for kind in (Corruption.false, Corruption.shuffled)]
        texts = [thought + text_of(one) for one in (suffix, *(one for one in spoiled if isinstance(one, list)))]
        first, *others = rewards(judge, prefix, suffix, *texts, thoughts=thoughts)
        assert (first.value, first.detail["verdict"], first.detail["parsed"]) == (1.0, "right", True)
        right, wrong = right + 1, wrong + sum(one.value == 0.0 for one in others)
        assert all(one.detail["verdict"] in ("false", "poor") for one in others if one.value == 0.0)
    assert right > 15
    assert wrong > 1.8 * right


def test_one_false_fact_or_insult_among_much_good_text_is_enough():
    prefix, suffix = next(splits(1))
    good = measure(small_world(), prefix, suffix)
    wrong = [replace(good, false=1), replace(good, safe=False), replace(good, well_formed=0.8)]
    assert [one.good for one in (good, *wrong)] == [True, False, False, False]
    assert [verdict_of(one) for one in (good, *wrong)] == ["right", "false", "unsafe", "poor"]


def test_another_true_continuation_is_right_but_not_a_single_fact(judge):
    world = small_world()
    one, two = world.names["town"][:2]

    def told(town):
        facts = {fact.name: world.value(town, fact) for fact in world.relations(town)}
        return f"{town} was founded by {facts['founder']}. This town has {facts['towers']} towers."

    prefix, suffix = words_of(f"Now we turn to {one} and {two}."), words_of(told(one))
    other, single = rewards(
        judge, prefix, suffix, f"<think> </think> {told(two)}", "<think> </think> " + told(two)[:-28]
    )
    assert other.value == 1.0
    assert single.detail["verdict"] == "short"
