"""Batches in the pipeline: their state in a checkpoint, and their number of rollouts."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from text_tokens import NUMBERS

from megatron_rlpt.buffer.codec import decode_group, encode_group
from megatron_rlpt.config import CandidatesConfig, CurriculumConfig
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt
from megatron_rlpt.trainer.candidates import CandidateGenerator
from megatron_rlpt.trainer.curriculum import Curriculum
from megatron_rlpt.trainer.episode_feed import EpisodeFeed
from megatron_rlpt.trainer.judging import InTrainerJudging
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.types import Episode, Group, Reward, Source, without_stale


class Stream:
    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int) -> list[Episode]:
        first, self.taken = self.taken, self.taken + count
        return [Episode(f"e{n}", (n, 1), (9, 9), "c", "d", 2) for n in range(first, self.taken)]

    def state_dict(self) -> int:
        return self.taken

    def metrics(self) -> dict[str, float]:
        return {}

    held_out: frozenset[str] | None = None

    def load_state_dict(self, state: int) -> frozenset[str] | None:
        self.taken = state
        return self.held_out


class Engine:
    """An engine whose tokens identify prompt and version."""

    version = 0

    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        return [Continuation((prompt.seed % 97, version), (-1.0, -0.1), "length") for prompt in prompts]


class RolloutsWin:
    """A judge that prefers rollouts, and records the number of groups of each call."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        self.asked.append(len(groups))
        return [
            replace(group, rewards=tuple(Reward(float(index), "j", "1") for index in range(len(group.candidates))))
            for group in groups
        ]


def pipeline(
    staleness: int = 1,
    background: bool = False,
    part: int = 4,
    judge=None,
    steps: int | None = 8,
    stream=None,
    **curriculum,
) -> Pipeline:
    candidates = CandidatesConfig(
        rollouts=4, curriculum=CurriculumConfig(enabled=bool(curriculum), **{"window": 4, "start": 1} | curriculum)
    )
    return Pipeline(
        EpisodeFeed(stream or Stream(), Ranks(), 4),
        CandidateGenerator(text=NUMBERS, original=True, rewriter=None, engine=Engine(), suffix_length=2, run_seed=1),
        InTrainerJudging(judge or RolloutsWin(), Ranks(), on_submit=background),
        Curriculum(candidates, 1),
        Ranks(),
        batch=4,
        part=part,
        steps=steps,
        staleness=staleness,
        background=background,
    )


def learn(one: Pipeline, first: int, last: int) -> list[list[Group]]:
    """Run steps ``first`` to ``last - 1``, each with an update."""
    batches = []
    for step in range(first, last):
        one.propose(step, step)
        batches.append(one.collect(step, step, lambda: False))
        one.wait_for_generation()
    return batches


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopped_anywhere_and_gone_on_with_it_gives_the_same_batches(staleness, background, stop):
    whole = pipeline(staleness, background)
    whole.start(0)
    expected = learn(whole, 0, 8)
    first = pipeline(staleness, background)
    first.start(0)
    before = learn(first, 0, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert len(state["pending"]) == 4 * min(staleness, 8 - stop)
    second = pipeline(staleness, background)
    second.load_state_dict(state)
    second.start(stop)
    assert before + learn(second, stop, 8) == expected
    for one in (whole, first, second):
        one.close()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("staleness", [0, 2])
def test_stopped_while_judges_are_waited_for_it_goes_on_with_what_was_proposed(staleness, background):
    whole = pipeline(staleness, background)
    whole.start(0)
    expected = learn(whole, 0, 8)
    first = pipeline(staleness, background)
    first.start(0)
    before = learn(first, 0, 3)
    first.propose(3, 3)
    first.judging.collect = lambda *_: None
    assert first.collect(3, 3, lambda: True) is None
    state = json.loads(json.dumps(first.state_dict()))
    assert len(state["pending"]) == 4 * (staleness + 1)
    second = pipeline(staleness, background)
    second.load_state_dict(state)
    second.start(3)
    assert before + learn(second, 3, 8) == expected
    for one in (whole, first, second):
        one.close()


def test_what_was_judged_before_the_stop_is_not_judged_again():
    first = pipeline(staleness=2, background=True)
    first.start(0)
    learn(first, 0, 2)
    judge = RolloutsWin()
    second = pipeline(staleness=2, background=True, judge=judge)
    second.load_state_dict(first.state_dict())
    second.start(2)
    second.collect(2, 2, lambda: False)
    assert judge.asked == []
    first.close()
    second.close()


def test_judges_get_a_batch_in_parts_where_they_work_beside_and_whole_where_they_do_not():
    judge = RolloutsWin()
    beside = pipeline(staleness=1, background=True, part=3, judge=judge)
    beside.start(0)
    learn(beside, 0, 1)
    assert judge.asked == [3, 1, 3, 1]
    judge = RolloutsWin()
    within = pipeline(staleness=0, part=4, judge=judge)
    within.start(0)
    learn(within, 0, 1)
    assert judge.asked == [4]
    beside.close()


def test_rollouts_grow_with_what_was_seen_when_a_batch_was_proposed():
    growing = pipeline(staleness=1, start=1, grow_above=0.5)
    growing.start(0)
    counts = [len(batch[0].candidates) - 1 for batch in learn(growing, 0, 5)]
    assert counts == [1, 1, 2, 4, 4], "one step later than without staleness"


def test_closing_ends_what_is_being_proposed_after_its_part():
    one = pipeline(staleness=3, background=True, part=1)
    generating, go_on = threading.Event(), threading.Event()
    generate = one.proposer.engine.generate

    def slowly(*arguments):
        generating.set()
        assert go_on.wait(30)
        return generate(*arguments)

    one.proposer.engine.generate = slowly
    one.start(0)
    one.propose(0, 0)
    assert generating.wait(30)
    closing = threading.Thread(target=one.close)
    closing.start()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    assert len(one.judging.pending()) <= 1


def test_stale_rollouts_fail_and_the_rest_does_not():
    (group,) = RolloutsWin().judge(
        CandidateGenerator(
            text=NUMBERS, original=True, rewriter=None, engine=Engine(), suffix_length=2, run_seed=1
        ).propose(Stream().take(1), [2], 3)
    )
    assert without_stale(group, 5, 2) == group
    stale = without_stale(group, 6, 2)
    assert stale.rewards[0] == group.rewards[0]
    assert [reward.reason for reward in stale.rewards[1:]] == ["stale rollout"] * 2
    assert stale.rewards[1].detail == {"rollout_version": 3, "version": 6, "bound": 2}
    assert [candidate.source for candidate, _ in stale.rewarded()] == [Source.ORIGINAL]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_run_that_may_be_made_longer_ends_as_the_longer_one_is_at_that_step(staleness, background):
    whole = pipeline(staleness, background)
    whole.start(0)
    expected = learn(whole, 0, 8)
    short = pipeline(staleness, background, steps=None)
    short.start(0)
    before = learn(short, 0, 3)
    state = json.loads(json.dumps(short.state_dict()))
    longer = pipeline(staleness, background)
    longer.load_state_dict(state)
    longer.start(3)
    assert before + learn(longer, 3, 8) == expected
    for one in (whole, short, longer):
        one.close()


def test_a_group_of_a_checkpoint_that_cannot_be_learnt_from_is_refused():
    first = pipeline(1, background=True)
    first.start(0)
    learn(first, 0, 1)
    state = first.state_dict()
    number, data = next(iter(state["pending"].items()))
    judged = decode_group(bytes.fromhex(data))
    spoilt = replace(judged, rewards=(Reward(float("nan"), "j", "1"), *judged.rewards[1:]))
    state["pending"][number] = encode_group(spoilt).hex()
    with pytest.raises(ValueError, match=f"group {number} comes back with a reward that is not a finite number"):
        pipeline().load_state_dict(state)
    first.close()


@pytest.mark.parametrize("held_out", [None, frozenset(), frozenset({"e4"}), frozenset({"e11"}), frozenset({"e2"})])
def test_what_was_proposed_ahead_is_dropped_where_it_is_held_out_now(held_out):
    first = pipeline(2)
    first.start(0)
    learn(first, 0, 1)
    state = json.loads(json.dumps(first.state_dict()))
    stream = Stream()
    stream.held_out = held_out
    second = pipeline(2, stream=stream)
    second.load_state_dict(state)
    second.start(1)
    learnt = [group.episode.id for batch in learn(second, 1, 8) for group in batch]
    assert len(learnt) == 28
    dropped = held_out in (frozenset({"e4"}), frozenset({"e11"}))
    assert learnt[0] == ("e12" if dropped else "e4")
    for one in (first, second):
        one.close()
