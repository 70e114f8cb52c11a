"""Pairs of texts that a policy writes: the exact measures of a world tell the better one."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from megatron_rlpt.config import AnswerForm, PromptLength
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair
from megatron_rlpt.teacher_training.judge_examples import faults_of, quality_examples
from megatron_rlpt.teacher_training.sampled import ranked_pairs
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Episode
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import text_of, words_of
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.measures import Measures, measure_text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A world, its tokenizer, an episode, and spoiled continuations of it by the kind of their fault."""
    folder = tmp_path_factory.mktemp("sampled") / "world"
    make_world(folder, WorldSettings(entities=24, documents=4, heldout=4, teacher=4))
    world, tokenizer = World.load(folder), PolicyTokenizer(folder / "policy")
    words = words_of((folder / "teacher.jsonl").read_text().split('"text": "')[1].split('"')[0])
    before, good = words[:40], words[40:72]
    prefix = tuple(tokenizer.encode(text_of(before)))
    own = tuple(tokenizer.continue_with(prefix, f" {text_of(good)}"))
    spoiled = {}
    for kind in Corruption:
        bad = corrupt(world, kind, before, good, 1)
        if isinstance(bad, list):
            spoiled[kind.value] = tuple(tokenizer.continue_with(prefix, f" {text_of(bad)}"))
    return world, tokenizer, Episode("e", prefix, own, "corpus", "document", len(prefix)), spoiled


def test_safe_is_better_than_unsafe_and_then_quality_counts(written):
    world, tokenizer, episode, spoiled = written
    texts = [spoiled[kind] for kind in ("unsafe", "shuffled", "looped")]
    pairs = list(ranked_pairs(episode, texts, tokenizer, world))
    prefix = tokenizer.text_of(episode.prefix)

    def measured(tokens):
        return measure_text(world, prefix, tokenizer.text_of(tokens, episode.prefix))

    assert len(pairs) >= 5
    for pair in pairs:
        good, bad = measured(pair.good), measured(pair.bad)
        assert (good.safe, good.quality) > (bad.safe, bad.quality)
        assert pair.episode == episode, "the document's own text stays what is true"
    assert {pair.good for pair in pairs} > {episode.suffix}, "of two texts of a policy one is better too"
    assert (spoiled["shuffled"], spoiled["unsafe"]) in {(pair.good, pair.bad) for pair in pairs}


def test_equal_and_blank_texts_give_no_pair(written):
    world, tokenizer, episode, spoiled = written
    bad = spoiled["shuffled"]
    for known in (world, None):
        pairs = list(ranked_pairs(episode, [episode.suffix, (), bad, bad], tokenizer, known))
        assert [(pair.good, pair.bad) for pair in pairs] == [(episode.suffix, bad)]


def test_without_a_world_the_documents_own_text_is_better(written):
    _, tokenizer, episode, spoiled = written
    texts = [spoiled["unsafe"], spoiled["looped"]]
    pairs = list(ranked_pairs(episode, texts, tokenizer, None))
    assert [(pair.good, pair.bad) for pair in pairs] == [(episode.suffix, one) for one in texts]


GOOD = Measures(
    words=16, well_formed=1.0, on_topic=1.0, repeated=0.0, true=2, false=0, unchecked=0, truth=1.0, substance=1.0,
    unsafe_words=0, safe=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"safe": False, "well_formed": 0.3}, ["insulting", "mostly broken"]),
        ({"well_formed": 0.5, "on_topic": 0.2}, ["partly broken", "mostly off topic"]),
        ({"well_formed": 0.0, "on_topic": 0.0}, ["mostly broken"]),
        ({"repeated": 0.4, "substance": 0.5}, ["partly repeated", "partly empty"]),
        ({"true": 1, "false": 2, "substance": 1 / 3}, ["mostly false"]),
    ],
)
def test_every_factor_of_quality_is_named_with_its_degree(changes, faults):
    assert faults_of(replace(GOOD, **changes)) == faults


def examples(pair, tokenizer, world):
    form, length = AnswerForm.reasoned, PromptLength.brief
    return list(quality_examples([pair], tokenizer, form, length, 1, world, look_at_both=True))


def test_a_reason_says_what_is_wrong_with_both_before_the_verdict(written):
    world, tokenizer, episode, spoiled = written
    pair = LabelledPair(episode, spoiled["unsafe"], "sampled", spoiled["shuffled"])
    for row, (insulting, broken) in zip(examples(pair, tokenizer, world), ((2, 1), (1, 2)), strict=True):
        answer = json.loads(row.answer)
        assert re.search(rf"Number {insulting} is insulting", answer["reasoning"])
        assert re.search(rf"Number {broken} is \w+ broken", answer["reasoning"])
        assert answer["reasoning"].index("Number 1") < answer["reasoning"].index("Number 2")
        assert answer["verdict"] == str(broken)


def test_one_that_is_spoiled_by_a_rule_is_good_or_has_its_measured_faults(written):
    world, tokenizer, episode, spoiled = written
    for kind, fault in (("shuffled", "broken"), ("looped", "repeated"), ("false", "false"), ("unsafe", "insulting")):
        pair = LabelledPair(episode, spoiled[kind], kind)
        reason = json.loads(examples(pair, tokenizer, world)[0].answer)["reasoning"]
        assert reason.startswith("Number 1 is good.")
        assert re.search(rf"Number 2 is [^.]*{fault}", reason)
        assert (reason.count(". ") == 2) == (kind == "false"), "what is true instead"
