"""Columns of what judges say, and the results made of them, with scripted judges."""

from __future__ import annotations

from dataclasses import replace

import pytest
from text_tokens import NUMBERS

from megatron_rlpt.config.evaluation_sets import COHERENCE, FACTS, FACTUALITY, QUALITY, SAFETY
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.evaluation.estimates import agreement, diversity, estimate
from megatron_rlpt.evaluation.measures import MeasureColumn, SetJudging, Written, counted
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.evaluation.results import JudgeRecord, Scale
from megatron_rlpt.evaluation.text_metrics import distinct_n
from megatron_rlpt.types import Episode, Failed, Reward

REFERENCE, ONE, TWO = "base", "one", "two"


class ScriptedJudge:
    """Rewards a continuation by ``value(tokens, seed)``; None is a failure."""

    def __init__(self, name, value, *, measures=(QUALITY,), prompted=False, seeded=False, is_relative=False):
        self.facts = JudgeRecord(name, name, False)
        self.measures, self.prompted, self.seeded, self.is_relative = measures, prompted, seeded, is_relative
        self.value = value
        self.calls = []

    def judge(self, groups, seed=0, measure=""):
        self.calls.append((measure, seed, [[one.tokens for one in group.candidates] for group in groups]))
        return [
            replace(group, rewards=tuple(self._reward(self.value(one.tokens, seed)) for one in group.candidates))
            for group in groups
        ]

    def score(self, groups, seed=0):
        return self.judge(groups, seed, "score")

    def compare(self, groups, seed, question):
        """Prefer the larger first token, always."""
        self.calls.append((question, seed, [[one.tokens for one in group.candidates] for group in groups]))
        judged = []
        for group in groups:
            first, second = (self.value(one.tokens, seed) for one in group.candidates)
            share = 0.5 if first == second else float(first > second)
            judged.append(replace(group, rewards=(self._reward(share), self._reward(1 - share))))
        return judged

    @staticmethod
    def _reward(value):
        return Failed("broken") if value is None else Reward(value, "scripted", "1")


def prompts(measures=(QUALITY,), count=4, suffixes=True, name="s"):
    episodes = tuple(
        Episode(f"{name}{index}", (9, index), (5, 6) if suffixes else (), "c", f"d{index}", 2) for index in range(count)
    )
    return PromptSet(name, "jsonl", "p", measures, 1.0, episodes, ("",) * count)


def written(measures=(QUALITY,), decoding="greedy", takes=1, suffixes=True, name="s", **values):
    """Return continuations of four prompts; ``values`` are the first tokens by model, ``[prompt]`` or one for all."""
    texts = {}
    for model, firsts in values.items():
        firsts = firsts if isinstance(firsts, list) else [firsts] * 4
        texts[model] = tuple(tuple((first + take, 1, 2) for first in firsts) for take in range(takes))
    return Written(prompts(measures, suffixes=suffixes, name=name), decoding, texts, REFERENCE)


def columns(judge, one, seeds=1):
    found = SetJudging(one, NUMBERS, seeds, Ranks()).columns(judge)
    return {(column.measure, column.model): column for column in found}


def test_a_reward_is_compared_and_shown():
    judge = ScriptedJudge("j", lambda tokens, seed: tokens[0])
    found = columns(judge, written(base=[1, 2, 3, 4], one=[2, 2, 2, 5], two=7))
    assert found[QUALITY, ONE].values == ((1.0,), (0.5,), (0.0,), (1.0,))
    assert found[QUALITY, TWO].values == ((1.0,),) * 4
    assert (QUALITY, REFERENCE) not in found
    assert found["reward", REFERENCE].values == ((1,), (2,), (3,), (4,))
    # All continuations of a prefix in one group: it is read once.
    assert [len(group) for _, _, groups in judge.calls for group in groups] == [3] * 4


def test_a_judge_whose_rewards_depend_on_the_group_sees_the_pair_only():
    judge = ScriptedJudge("j", lambda tokens, seed: tokens[0], is_relative=True)
    found = columns(judge, written(base=1, one=2, two=1))
    assert found[QUALITY, ONE].values == ((1.0,),) * 4
    assert found[QUALITY, TWO].values == ((0.5,),) * 4
    assert {len(group) for _, _, groups in judge.calls for group in groups} == {2}
    assert not any(measure == "reward" for measure, _ in found)


def test_a_prompted_judge_compares_pairs_once_per_seed():
    judge = ScriptedJudge(
        "j", lambda tokens, seed: tokens[0], measures=(QUALITY, COHERENCE), prompted=True, seeded=True
    )
    found = columns(judge, written((QUALITY, COHERENCE, SAFETY), base=1, one=[0, 1, 2, 3]), seeds=3)
    assert found.keys() == {(QUALITY, ONE), (COHERENCE, ONE)}
    assert found[QUALITY, ONE].values == ((0.0,) * 3, (0.5,) * 3, (1.0,) * 3, (1.0,) * 3)
    assert [(question, seed) for question, seed, _ in judge.calls] == [
        (question, seed) for question in (QUALITY, COHERENCE) for seed in range(3)
    ]
    # The reference is the first candidate.
    assert judge.calls[0][2][0] == [(1, 1, 2), (0, 1, 2)]


def test_a_judge_that_says_the_same_with_every_seed_is_asked_once():
    judge = ScriptedJudge("j", lambda tokens, seed: tokens[0], prompted=True)
    assert columns(judge, written(base=1, one=2), seeds=5)[QUALITY, ONE].values == ((1.0,),) * 4
    assert len(judge.calls) == 1


def test_safety_is_the_verdict_of_most_votes():
    votes = {0: 0.6, 1: 0.2, 2: 0.5}
    judge = ScriptedJudge("j", lambda tokens, seed: votes[seed], measures=(SAFETY,), prompted=True, seeded=True)
    one = written((SAFETY,), base=1, one=2)
    # 0.6, then (0.6 + 0.2) / 2 = 0.4 of all votes
    assert columns(judge, one, seeds=1)[SAFETY, ONE].values == ((1.0,),) * 4
    assert columns(judge, one, seeds=2)[SAFETY, ONE].values == ((0.0,),) * 4
    votes[1] = 0.4
    assert columns(judge, one, seeds=2)[SAFETY, REFERENCE].values == ((0.5,),) * 4
    # Each continuation by itself.
    assert {len(group) for _, _, groups in judge.calls for group in groups} == {1}


def test_what_needs_a_reference_is_asked_only_where_there_is_one():
    judge = ScriptedJudge("j", lambda tokens, seed: 0.5, measures=(FACTUALITY,), prompted=True)
    known = columns(judge, written((FACTUALITY, FACTS), base=1, one=2))
    assert known.keys() == {(FACTUALITY, REFERENCE), (FACTUALITY, ONE), (FACTS, ONE)}
    unknown = columns(judge, written((FACTUALITY, FACTS), suffixes=False, base=1, one=2))
    assert unknown[FACTS, ONE].values == ((),) * 4


def test_a_failure_is_no_number_and_blank_text_no_comparison():
    judge = ScriptedJudge("j", lambda tokens, seed: None if tokens[0] == 2 else 1.0)
    found = columns(judge, written(base=1, one=[2, 3, 3, 3]))
    assert found[QUALITY, ONE].values == ((None,), (0.5,), (0.5,), (0.5,))
    (rate,) = (one for one in estimate(list(found.values()), {}, 0)[0] if one.measure == QUALITY)
    assert (rate.value, rate.n, rate.prompts, rate.failed) == (0.5, 3, 3, 1)


def test_too_few_decided_comparisons_are_said_and_not_shown():
    judge = ScriptedJudge("j", lambda tokens, seed: 1.0 if tokens[0] == 3 else None)
    results, notes = estimate(list(columns(judge, written(base=3, one=[2, 2, 2, 3])).values()), {}, 0)
    assert not [one for one in results if one.model == ONE]
    assert any(note.startswith("There is no quality by j of one on s: 1 ") for note in notes)


def test_differences_are_between_models_under_one_judge_and_decoding():
    first, second = (ScriptedJudge(name, lambda tokens, seed: tokens[0]) for name in "jk")
    one = written(base=1, one=[2, 2, 2, 0], two=0)
    both = [*columns(first, one).values(), *columns(second, one).values()]
    found = [one for one in estimate(both, {}, 0)[0] if one.scale is Scale.difference]
    assert [(one.model, one.against, one.judge, one.value) for one in found] == [
        (ONE, TWO, "j", 0.75), (ONE, TWO, "k", 0.75)
    ]  # fmt: skip


def test_a_mean_over_sets_has_their_weights():
    values = {"a": ((1.0,),) * 4, "b": ((0.0,),) * 4 + ((1.0,),) * 4, "c": ((0.0,),) * 4}
    parts = [MeasureColumn(SAFETY, Scale.share, ONE, name, rows, judge="j") for name, rows in values.items()]
    (mean,) = (one for one in estimate(parts, {"a": 3.0, "b": 1.0, "c": 0.0}, 0)[0] if one.set == "all")
    assert mean.value == pytest.approx((3 * 1.0 + 0.5) / 4)
    assert mean.ci95[0] < mean.value < mean.ci95[1]
    assert (mean.n, mean.prompts) == (12, 12)
    alone = estimate(parts[:1], {"a": 1.0}, 0)[0]
    assert [one.set for one in alone] == ["a"]


def test_judges_agree_over_seeds_and_samples():
    one = written(takes=2, decoding="sampled", base=[5, 5, 5, 5], one=[6, 6, 4, 4])
    sure = ScriptedJudge("sure", lambda tokens, seed: tokens[0])
    # Votes against what it thinks with one of three seeds.
    noisy = ScriptedJudge(
        "noisy", lambda tokens, seed: -tokens[0] if seed == 2 else tokens[0], prompted=True, seeded=True
    )
    found = [*columns(sure, one).values(), *columns(noisy, one, seeds=3).values()]
    (agreed,) = agreement(found, 0)
    assert (agreed.judges, agreed.share, agreed.n) == (("sure", "noisy"), 1.0, 8)


def test_counts_need_no_judge():
    one = written(base=1, one=2)
    loops = replace(one, texts={REFERENCE: (((7,) * 8,) * 4,), ONE: one.texts[ONE]})
    found = {(column.measure, column.model): column for column in counted(loops)}
    assert found["repetition", REFERENCE].values == ((pytest.approx(5 / 6),),) * 4
    assert found["repetition", ONE].values == ((0.0,),) * 4
    assert found["length", REFERENCE].values == ((8.0,),) * 4
    assert found["length", "original"].values == ((2.0,),) * 4
    # The documents' own suffixes are not measured again for every decoding.
    assert not [one for one in counted(replace(loops, decoding="sampled")) if one.model == "original"]
    shares = {(result.measure, result.model): result.value for result in diversity(loops)}
    assert shares["distinct_2", REFERENCE] == 1 / 28
    assert shares["distinct_2", ONE] == 2 / 8


def test_diversity_counts_over_the_whole_set():
    assert distinct_n([(1, 2, 3), (1, 2, 4)], 2) == 3 / 4
    assert distinct_n([(1,), (2,)], 2) is None
