from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.config import ObjectiveConfig
from megatron_rlpt.objectives import OBJECTIVES, build_objective, facts_of
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

JUDGED = ("online_dpo", "rf_nll")


def objective(name: str):
    return build_objective(ObjectiveConfig(name=name))


def group_of(*rewards: float | None, tokens: list[int] | None = None, episode: str = "e") -> Group:
    """One candidate per reward, distinct unless ``tokens`` says otherwise; None is a failed judgment."""
    names = tokens or list(range(len(rewards)))
    sources = [Source.ORIGINAL, Source.REWRITE] + [Source.ROLLOUT] * len(rewards)
    candidates = tuple(Candidate(source, (token,)) for source, token in zip(sources, names, strict=False))
    return Group(
        Episode(episode, (7,), (8,), "c", "d", 0),
        candidates,
        tuple(Failed("no verdict") if value is None else Reward(value, "j", "p") for value in rewards),
    )


def selected(group: Group, name: str = "online_dpo") -> tuple[int, ...]:
    (example,) = objective(name).select([group]).examples
    assert example.sequences == tuple(group.candidates[index] for index in example.indices)
    assert example.episode == group.episode
    return example.indices


def test_best_is_chosen_and_worst_rejected_with_their_difference_as_margin():
    group = group_of(0.25, -1.0, 2.5, 1.0)
    assert selected(group) == (2, 1)
    assert objective("online_dpo").select([group]).examples[0].margin == 3.5


def test_reward_filtered_nll_keeps_the_best_alone():
    assert selected(group_of(0.25, -1.0, 2.5, 1.0), "rf_nll") == (2,)


@pytest.mark.parametrize("name", JUDGED)
def test_a_group_of_equal_rewards_is_skipped_as_a_tie(name):
    selection = objective(name).select([group_of(1.0, 1.0, 1.0, episode="tied"), group_of(1.0, 2.0, episode="good")])
    assert [example.episode.id for example in selection.examples] == ["good"]
    assert selection.skipped == {"tied": "tie"}
    assert selection.skip_counts() == {"tie": 1}


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("rewards", [(), (None, None), (None, 3.0)])
def test_fewer_than_two_scored_candidates_are_skipped_with_the_reason(name, rewards):
    selection = objective(name).select([group_of(*rewards)])
    assert selection.examples == []
    assert selection.skipped == {"e": "fewer than two distinct scored candidates"}


def test_failed_candidates_are_neither_chosen_nor_rejected():
    assert selected(group_of(None, 0.5, None, -0.5, None)) == (1, 3)


def test_identical_candidates_count_once_and_are_counted():
    group = group_of(1.0, 0.0, 0.0, 0.0, tokens=[5, 6, 6, 6])
    selection = objective("online_dpo").select([group])
    assert selection.examples[0].indices == (0, 1)
    assert selection.duplicates == 2


def test_a_group_of_one_text_in_many_copies_teaches_nothing_whatever_the_scores():
    """Judged separately, copies can get different scores; a pair of them would train on noise."""
    selection = objective("online_dpo").select([group_of(1.0, 0.0, 2.0, tokens=[5, 5, 5])])
    assert selection.examples == []
    assert selection.skipped == {"e": "fewer than two distinct scored candidates"}
    assert selection.duplicates == 2


def test_a_copy_whose_judgment_failed_does_not_hide_the_copy_that_was_scored():
    selection = objective("online_dpo").select([group_of(None, 3.0, 1.0, tokens=[5, 5, 6])])
    assert selection.examples[0].indices == (1, 2)
    assert selection.duplicates == 0


@pytest.mark.parametrize(
    ("rewards", "role", "among"),
    [((1.0, 1.0, 0.0, 1.0, 1.0), 0, {0, 1, 3, 4}), ((0.0, 0.0, 1.0, 0.0, 0.0), 1, {0, 1, 3, 4})],
    ids=["best", "worst"],
)
def test_candidates_that_share_the_extreme_reward_are_drawn_alike_by_episode(rewards, role, among):
    episodes = 2000
    drawn = [selected(group_of(*rewards, episode=f"episode-{index}"))[role] for index in range(episodes)]
    assert set(drawn) == among
    for index in among:
        # Four equal chances: 500 expected, standard deviation 19.4.
        assert abs(drawn.count(index) - episodes / 4) < 5 * 19.4
    again = [selected(group_of(*rewards, episode=f"episode-{index}"))[role] for index in range(50)]
    assert again == drawn[:50]


def test_draws_for_best_and_worst_are_independent():
    rewards = (1.0, 1.0, 0.0, 0.0)
    pairs = {selected(group_of(*rewards, episode=f"episode-{index}")) for index in range(200)}
    assert pairs == {(0, 2), (0, 3), (1, 2), (1, 3)}


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=12), st.data())
def test_for_any_scores_chosen_has_the_most_and_rejected_the_least(rewards, data):
    tokens = data.draw(st.lists(st.integers(0, 6), min_size=len(rewards), max_size=len(rewards)))
    group = group_of(*rewards, tokens=tokens)
    selection = objective("online_dpo").select([group])
    first: dict[int, float] = {}
    for token, value in zip(tokens, rewards, strict=True):
        if value is not None:
            first.setdefault(token, value)
    scored = sum(value is not None for value in rewards)
    assert selection.duplicates == scored - len(first)
    assert len(selection.examples) + len(selection.skipped) == 1
    if not selection.examples:
        assert len(set(first.values())) < 2
        return
    (example,) = selection.examples
    best, worst = example.indices
    assert rewards[best] == max(first.values()) > min(first.values()) == rewards[worst]
    assert tokens[best] != tokens[worst]
    assert example.margin == rewards[best] - rewards[worst]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ntp", Source.ORIGINAL),
        ("sft_rewrite", Source.REWRITE),
        ("sft_rollout", Source.ROLLOUT),
    ],
)
def test_unjudged_objectives_take_the_first_candidate_of_their_source(name, source):
    group = group_of(None, None, None, None)
    unjudged = Group(group.episode, group.candidates)
    selection = objective(name).select([unjudged])
    (example,) = selection.examples
    assert example.sequences[0].source is source
    assert example.indices == ({Source.ORIGINAL: 0, Source.REWRITE: 1, Source.ROLLOUT: 2}[source],)
    assert example.margin is None


def test_a_group_without_the_wanted_source_is_skipped_with_the_reason():
    """A failed rewrite leaves its group without one."""
    group = Group(Episode("e", (1,), (2,), "c", "d", 0), (Candidate(Source.ORIGINAL, (2,)),))
    selection = objective("sft_rewrite").select([group])
    assert selection.examples == []
    assert selection.skipped == {"e": "no rewrite"}


@pytest.mark.parametrize(
    ("name", "judge", "reference"),
    [
        ("ntp", False, False),
        ("sft_rewrite", False, False),
        ("sft_rollout", False, False),
        ("rf_nll", True, False),
        ("online_dpo", True, True),
        ("grpo", True, False),
    ],
)
def test_objectives_say_what_they_need(name, judge, reference):
    built = objective(name)
    assert (facts_of(name).needs_judge, built.facts.needs_reference) == (judge, reference)
    group = group_of(None, None, None)
    unjudged = Group(group.episode, group.candidates)
    if judge:  # its selection is not possible without rewards
        with pytest.raises(ValueError, match="zip"):
            built.select([unjudged])
    else:
        assert len(built.select([unjudged]).examples) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_chooses_a_candidate_without_text(name):
    """Not even one that a worker gave the best or the worst score."""
    for source in Source:
        candidates = tuple(Candidate(source, (token,), logprobs=(-1.0,), blank=token in (0, 3)) for token in range(4))
        group = Group(
            Episode("e", (7,), (8,), "c", "d", 0), candidates, tuple(Reward(float(v), "j", "p") for v in (9, 1, 2, -9))
        )
        for offered in (group, replace(group, candidates=candidates[:1], rewards=group.rewards[:1])):
            selection = objective(name).select([offered])
            assert not [one for example in selection.examples for one in example.sequences if one.blank]
            assert selection.examples or selection.skipped
