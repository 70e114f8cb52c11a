from __future__ import annotations

import json

import pytest

from megatron_rlpt.config import CandidatesConfig, CurriculumConfig
from megatron_rlpt.trainer.curriculum import Curriculum
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source


def episode(name: str) -> Episode:
    return Episode(name, (1,), (2,), "c", "d", 0)


def group(original: float | None, *rollouts: float | None) -> Group:
    values = (original, *rollouts)
    sources = (Source.ORIGINAL, *[Source.ROLLOUT] * len(rollouts))
    return Group(
        episode("e"),
        tuple(Candidate(source, (index,)) for index, source in enumerate(sources)),
        tuple(Failed("no verdict") if value is None else Reward(value, "j", "p") for value in values),
    )


WON, LOST = group(0.0, 1.0), group(1.0, 0.0)


def curriculum(rollouts: int = 8, seed: int = 3, **settings) -> Curriculum:
    settings = {"enabled": True, "start": 1, "grow_above": 0.5, "window": 4} | settings
    return Curriculum(CandidatesConfig(rollouts=rollouts, curriculum=CurriculumConfig(**settings)), seed)


def test_off_every_episode_has_all_rollouts_from_the_beginning():
    always = curriculum(enabled=False)
    assert always.rollouts([episode("a"), episode("b")], always.level) == [8, 8]
    always.observe([LOST] * 100)
    assert always.level == 8


def test_it_doubles_each_time_rollouts_win_often_enough_and_stops_at_the_most():
    growing, levels = curriculum(rollouts=6), []
    for _ in range(5):
        levels.append(growing.level)
        growing.observe([WON] * 4)
    assert levels == [1, 2, 4, 6, 6]


def test_from_none_it_goes_to_one():
    growing = curriculum(start=0)
    growing.observe([WON] * 4)
    assert growing.level == 1


def test_it_does_not_grow_before_the_window_is_full_nor_at_the_bound():
    growing = curriculum()
    growing.observe([WON] * 3)
    assert growing.level == 1
    growing = curriculum()
    growing.observe([WON, WON, LOST, LOST])  # 2 of the last 4: not more than a half
    assert growing.level == 1
    growing.observe([WON, WON, WON])
    assert growing.level == 2


def test_after_growing_it_starts_to_count_anew():
    growing = curriculum()
    growing.observe([WON] * 4)
    growing.observe([WON] * 3)
    assert growing.level == 2
    growing.observe([WON])
    assert growing.level == 4


@pytest.mark.parametrize(
    "nothing",
    [group(1.0), group(None, 1.0), group(1.0, None), group(None, None)],
    ids=["no rollout", "original failed", "rollout failed", "both failed"],
)
def test_groups_without_a_competition_count_for_nothing(nothing):
    growing = curriculum()
    growing.observe([nothing] * 50)
    assert growing.state_dict() == {"level": 1, "wins": []}


def test_a_tie_is_not_won_by_the_rollout():
    growing = curriculum()
    growing.observe([group(1.0, 1.0)] * 4)
    assert growing.level == 1


def test_with_none_a_share_of_the_episodes_probes_and_always_the_same():
    probing, names = curriculum(start=0, probe=0.25), [episode(f"e{index}") for index in range(2000)]
    counts = probing.rollouts(names, 0)
    assert set(counts) == {0, 1}
    assert 400 < sum(counts) < 600
    assert curriculum(start=0, probe=0.25).rollouts(names, 0) == counts
    assert curriculum(start=0, probe=0.25, seed=4).rollouts(names, 0) != counts


def test_a_resumed_run_goes_on_with_the_same_numbers():
    one, seen = curriculum(), [WON, LOST, WON, WON, LOST, WON, WON, WON, WON, LOST]
    for index, shown in enumerate(seen):
        other = curriculum()
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        rest = []
        for later in seen[index:]:
            other.observe([later])
            rest.append(other.level)
        twin = curriculum()
        expected = []
        for later in seen:
            twin.observe([later])
            expected.append(twin.level)
        assert rest == expected[index:]
        one.observe([shown])
