"""The declared facts of every objective, and that its selection agrees with them."""

from __future__ import annotations

import pytest

from megatron_rlpt.config import ObjectiveConfig
from megatron_rlpt.objectives import OBJECTIVES, build_objective, facts_of, facts_with
from megatron_rlpt.types import Candidate, Episode, Group, Reward, Source


@pytest.mark.parametrize(
    ("name", "rows"),
    [("ntp", 1), ("sft_rewrite", 1), ("sft_rollout", 1), ("rf_nll", 1), ("online_dpo", 2), ("grpo", 6)],
)
def test_sequences_per_example(name, rows):
    assert facts_of(name).rows_per_example(original=True, rewrite=True, rollouts=6) == rows


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_selection_keeps_to_the_facts(name):
    facts = facts_of(name)
    sources = [Source.ORIGINAL, Source.REWRITE, *[Source.ROLLOUT] * 4]
    candidates = tuple(Candidate(source, (5, index), logprobs=(-1.0, -1.0)) for index, source in enumerate(sources))
    rewards = tuple(Reward(float(index % 5), "j", "p") for index in range(len(sources)))
    (example,) = (
        build_objective(ObjectiveConfig(name=name))
        .select([Group(Episode("e", (7,), (8,), "c", "d", 0), candidates, rewards)])
        .examples
    )
    assert {one.source for one in example.sequences} <= facts.trains_on
    assert len(example.sequences) == facts.rows_per_example(original=True, rewrite=True, rollouts=4)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_facts_with_settings_are_those_of_the_objective_that_is_built(name, kl):
    settings = ObjectiveConfig(name=name, kl=kl)
    assert facts_with(settings) == build_objective(settings).facts
    assert facts_with(settings).needs_reference == (name == "online_dpo" or (name == "grpo" and kl > 0))
