"""The world is the same for the same seed, and is read back as it was written."""

from __future__ import annotations

import json
import random

import pytest
from world_texts import COUNTS, small_world

from megatron_rlpt.errors import DataError
from megatron_rlpt.world.facts import World


def test_equal_seeds_give_equal_worlds_and_others_do_not():
    assert World.make(1, COUNTS).digest == small_world().digest
    assert World.make(2, COUNTS).digest != small_world().digest
    assert {kind: len(names) for kind, names in small_world().names.items()} == COUNTS


def test_one_value_is_true_and_every_other_is_false():
    world = small_world()
    for name in world.kinds:
        for relation in world.relations(name):
            true, other = world.value(name, relation), world.other_value(name, relation, random.Random(0))
            assert true != name != other
            assert world.is_true(name, relation, true, negated=False)
            assert not world.is_true(name, relation, other, negated=False)
            assert world.is_true(name, relation, other, negated=True)


def test_a_world_is_read_back(tmp_path):
    small_world().save(tmp_path / "facts.json")
    for path in (tmp_path, tmp_path / "facts.json"):
        assert World.load(path).digest == small_world().digest


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("[]", "no table of facts"),
        ("{", "no table of facts"),
        (json.dumps({"version": "0", "entities": {}}), "version 0"),
        (json.dumps({"version": "1", "entities": {"Aba": {"kind": "town", "facts": {}}}}), "river of Aba"),
    ],
)
def test_what_is_no_world_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "facts.json").write_text(content)
    with pytest.raises(DataError, match=said):
        World.load(tmp_path)
