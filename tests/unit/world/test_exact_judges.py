"""Exact judges by the interface for classes of the user's."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean

import pytest

from megatron_rlpt.config import asks_teacher, load_config
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.teacher.build import build_teacher
from megatron_rlpt.teacher.judge_metrics import judge_health
from megatron_rlpt.teacher.judges import builder_of
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import BLANK, Candidate, Episode, Failed, Group, Reward, Source
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import text_of, words_of
from megatron_rlpt.world.judges import ExactReward
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.measures import measure_text

MODULE = "megatron_rlpt.world.judges"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("judged") / "world"
    make_world(out, WorldSettings(documents=2, heldout=12, length=64))
    return out


@pytest.fixture
def config_of(folder, tmp_path):
    """Load the configuration of a run with this section ``teacher``."""

    def load(**teacher):
        settings = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(folder / "policy")},
            "data": {"sources": [{"path": str(folder / "train.jsonl")}]},
            "candidates": {"rewrite": True},
            "train": {"steps": 1},
            "teacher": teacher,
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        return load_config(path)

    return load


@pytest.fixture
def judge(folder, config_of):
    """Build a judge as a run does, and judge groups with it."""

    def build(name="ExactJudge", **options):
        config = config_of(judge=f"{MODULE}:{name}", options={"world": str(folder)} | options)
        return builder_of(config).in_trainer(config, "cpu", lambda: pytest.fail("asks a teacher")).judge

    return build


@pytest.fixture
def group(folder):
    """Return prefix and group: the original suffix, corruptions of it by their name, and a blank candidate."""
    world, tokenizer = World.load(folder), PolicyTokenizer(folder / "policy")

    def build(number=0, kinds=(Corruption.false, Corruption.unsafe, Corruption.shuffled)):
        text = json.loads((folder / "heldout.jsonl").read_text().splitlines()[number])["text"]
        words = words_of(text)
        prefix, suffix = words[:24], words[24:56]
        spoiled = [corrupt(world, kind, prefix, suffix, number) for kind in kinds]
        before = tokenizer.encode(text_of(prefix))
        rows = [
            tokenizer.continue_with(before, " " * (one[0] not in ".,") + text_of(one)) for one in (suffix, *spoiled)
        ]
        candidates = [Candidate(Source.ROLLOUT, tuple(row)) for row in rows]
        candidates.append(Candidate(Source.ROLLOUT, (2,), blank=True))
        episode = Episode(f"e{number}", tuple(before), tuple(rows[0]), "c", "d", len(before))
        return Group(episode, tuple(candidates))

    return build


def values(group):
    return [one.value if isinstance(one, Reward) else one for one in group.rewards]


def test_rewards_are_the_weighted_exact_axes(judge, group):
    (judged,) = judge(quality=1.0, safety=2.0, factuality=0.0)([group()])
    good, false, unsafe, shuffled, blank = values(judged)
    assert good == 3.0
    assert 2.0 < false < 3.0
    assert unsafe < 1.0 + 1e-9
    assert 2.0 <= shuffled < false
    assert blank == BLANK
    assert judged.rewards[1].detail["measures"]["false"] == 1


def test_factuality_is_that_of_the_paper(judge, group):
    (judged,) = judge(quality=0.0, factuality=1.0)([group()])
    assert values(judged)[1] == 0.0
    assert values(judged)[0] in (1.0, 0.5)


def test_what_is_judged_is_what_is_measured(judge, group, folder):
    one, tokenizer = group(), PolicyTokenizer(folder / "policy")
    (judged,) = judge()([one])
    prefix = tokenizer.text_of(one.episode.prefix)
    for candidate, reward in zip(one.candidates[:-1], judged.rewards, strict=False):
        text = tokenizer.text_of(candidate.tokens, one.episode.prefix)
        assert reward.value == measure_text(World.load(folder), prefix, text).quality


@pytest.mark.parametrize("scheme", ["round_robin", "tournament", "elimination", "pivot"])
def test_comparisons_without_errors_find_the_best_and_the_worst(judge, group, scheme):
    kinds = (Corruption.false, Corruption.foreign, Corruption.looped, Corruption.shuffled, Corruption.spoiled)
    compare = judge("ExactComparisons", scheme=scheme, votes=2)
    exact = judge()
    for number in range(6):
        one = group(number, kinds)
        (compared,), (judged,) = compare([one]), exact([one])
        found, true = values(compared)[:-1], values(judged)[:-1]
        assert compared.cost.calls > 0
        if scheme != "pivot":  # with which all that beat the pivot are alike
            assert true[found.index(max(found))] == max(true)
            assert true[found.index(min(found))] == min(true)


def test_a_judge_that_errs_is_wrong_as_often_as_asked(judge, group):
    compare = judge("ExactComparisons", scheme="round_robin", votes=1, error_rate=0.3)
    wrong = []
    for number in range(12):
        for kind in (Corruption.false, Corruption.shuffled, Corruption.foreign, Corruption.looped):
            (judged,) = compare([group(number, (kind,))])
            wrong.append(values(judged)[0] < values(judged)[1])
    assert 0.1 < fmean(wrong) < 0.5
    compare = judge("ExactComparisons", scheme="round_robin", votes=99, error_rate=0.3)
    (judged,) = compare([group(0, (Corruption.shuffled,))])
    assert values(judged)[0] == pytest.approx(0.7, abs=0.15)


def test_bias_and_cost_of_comparisons_are_in_the_metrics(judge, group):
    figures = judge_health(judge("ExactComparisons", scheme="round_robin", votes=3, error_rate=0.3)([group()]))
    assert figures["judge/calls"] == 18
    assert 0.4 < figures["judge/agreement"] < 1.0
    assert "judge/failed_votes" not in judge_health(judge()([group()]))


def test_verdicts_depend_on_seed_and_episode_alone(judge, group):
    compare = judge("ExactComparisons", error_rate=0.4)
    groups = [group(number) for number in range(4)]
    one_by_one = [values(compare([one])[0]) for one in groups]
    assert [values(one) for one in compare(groups)] == one_by_one


def test_one_candidate_has_nothing_to_compare_with(judge, group):
    one = group()
    alone = Group(one.episode, one.candidates[:1])
    (judged,) = judge("ExactComparisons")([alone])
    assert judged.rewards == (Failed("nothing to compare with", judged.rewards[0].detail),)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ExactJudge", {"quality": 0.0}, "no weight above 0"),
        ("ExactJudge", {"safety": -1.0}, "safety is -1"),
        ("ExactJudge", {"world": "nowhere"}, "nowhere cannot be read"),
        ("ExactComparisons", {"scheme": "league"}, "scheme is 'league'; allowed: round_robin, pivot"),
        ("ExactComparisons", {"error_rate": 0.7}, "error_rate is 0.7"),
        ("ExactComparisons", {"votes": 0}, "votes is 0"),
    ],
)
def test_bad_options_are_one_line(judge, name, options, said):
    with pytest.raises(ConfigError, match=said):
        judge(name, **options)


def test_training_without_a_judge_prefers_the_rewrite_whatever_it_says(judge, group):
    one = group()
    candidates = (*one.candidates[:-1], replace(one.candidates[0], source=Source.REWRITE))
    (judged,) = judge(quality=0.0, rewrite=1.0)([replace(one, candidates=candidates)])
    assert values(judged) == [0.0] * (len(candidates) - 1) + [1.0]


def test_rewrites_of_episodes_have_the_length_of_their_suffix(group, folder, config_of):
    tokenizer = PolicyTokenizer(folder / "policy")
    named = {"name": "megatron_rlpt.world.rewriter:ExactRewriter", "options": {"world": str(folder)}}
    config = config_of(judge=f"{MODULE}:ExactJudge", options={"world": str(folder)}, rewriter=named)
    assert not asks_teacher(config)
    rewriter = build_teacher(config, "cpu", Ranks()).rewriter
    world = World.load(folder)
    for number in range(6):
        one = group(number)
        good, bad = one.episode, replace(one.episode, suffix=one.candidates[2].tokens)
        copied, repaired = rewriter.rewrite([good, bad])
        assert copied.tokens == good.suffix
        assert len(repaired.tokens) == len(bad.suffix)
        text = tokenizer.text_of(repaired.tokens, bad.prefix)
        found = measure_text(world, tokenizer.text_of(bad.prefix), text)
        assert (found.quality, found.safe) == (1.0, True)


def test_a_second_measure_is_one_of_the_measures(folder):
    prefix, text = "Nobody knows why.", " The reason is simple. The reason is simple."
    assert ExactReward(str(folder), "repeated").reward(prefix, [text]) == [0.5]
    assert ExactReward(str(folder), "safe").reward(prefix, [text]) == [1.0]
    assert ExactReward(str(folder), "truth").reward(prefix, [text]) == [Failed("nothing to check")]
    with pytest.raises(ConfigError, match="allowed: quality"):
        ExactReward(str(folder), "beauty")
