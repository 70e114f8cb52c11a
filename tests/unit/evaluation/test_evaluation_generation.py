"""Blocks of prompts, and the continuations that are kept."""

from __future__ import annotations

import json

from megatron_rlpt.evaluation.generation import GenerationCache, blocks_of, takes_of
from megatron_rlpt.types import Episode

FACTS = {"weights": "w", "tokens": 3}


def episodes(*prefixes):
    return [Episode(str(number), prefix, (), "c", "d", 0) for number, prefix in enumerate(prefixes)]


def test_blocks_depend_on_their_own_prompts_only():
    many = blocks_of(episodes((1,), (2,), (3,), (4,), (5,)), 0, 1, size=2)
    assert [len(block.prompts) for block in many] == [2, 2, 1]
    assert many[:2] == blocks_of(episodes((1,), (2,), (3,), (4,)), 0, 1, size=2)
    assert many[1] == blocks_of(episodes((3,), (4,)), 0, 1, size=2)[0]
    assert many[0].key != many[1].key
    assert all(prompt.greedy for block in many for prompt in block.prompts)


def test_samples_of_a_prompt_are_adjacent_and_have_seeds_of_their_own():
    (block,) = blocks_of(episodes((1,), (2,)), 3, 7, size=8)
    assert [prompt.prefix for prompt in block.prompts] == [(1,)] * 3 + [(2,)] * 3
    assert len({prompt.seed for prompt in block.prompts}) == 6
    assert block.key != blocks_of(episodes((1,), (2,)), 3, 8, size=8)[0].key
    tokens = {block.key: [(number,) for number in range(6)]}
    assert takes_of([block], tokens, 3) == (((0,), (3,)), ((1,), (4,)), ((2,), (5,)))
    assert takes_of([block], {block.key: [(8,), (9,)]}, 0) == (((8,), (9,)),)


def test_what_was_stored_is_found_again(tmp_path):
    one, two = blocks_of(episodes((1,), (2,), (3,)), 0, 1, size=2)
    cache = GenerationCache(tmp_path, FACTS, rank=1)
    assert cache.find(one) is None
    cache.store(one, [(4, 5), (6,)])
    for reader in (cache, GenerationCache(tmp_path, FACTS), GenerationCache(tmp_path, dict(reversed(FACTS.items())))):
        assert reader.find(one) == ((4, 5), (6,))
        assert reader.find(two) is None
    assert GenerationCache(tmp_path, FACTS | {"weights": "x"}).find(one) is None
    assert GenerationCache(tmp_path, FACTS | {"tokens": 4}).find(one) is None


def test_a_line_that_was_cut_off_is_generated_again(tmp_path):
    one, two = blocks_of(episodes((1,), (2,), (3,)), 0, 1, size=2)
    cache = GenerationCache(tmp_path, FACTS)
    cache.store(one, [(4,), (5,)])
    cache.store(two, [(6,)])
    (file,) = tmp_path.glob("generations/*/0.jsonl")
    for length in range(len(file.read_bytes()), len(file.read_bytes()) - len(json.dumps("6")) - 30, -1):
        file.write_bytes(file.read_bytes()[:length])
        again = GenerationCache(tmp_path, FACTS)
        assert again.find(one) == ((4,), (5,))
        assert again.find(two) in (None, ((6,),))
    again = GenerationCache(tmp_path, FACTS)
    again.store(two, [(7,)])
    last = GenerationCache(tmp_path, FACTS)
    assert (last.find(one), last.find(two)) == (((4,), (5,)), ((7,),))
