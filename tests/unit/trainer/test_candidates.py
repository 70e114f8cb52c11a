from __future__ import annotations

from collections.abc import Sequence

import pytest
from text_tokens import NUMBERS, FakeText

from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt
from megatron_rlpt.trainer.candidates import CandidateGenerator
from megatron_rlpt.types import Candidate, Episode, Failed, Source


class EchoEngine:
    """Continues every prompt with the last digits of its seed, so that results identify their requests."""

    def __init__(self) -> None:
        self.version = 5
        self.asked: list[tuple[list[RolloutPrompt], int, int]] = []

    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        self.asked.append((list(prompts), max_tokens, version))
        return [Continuation((prompt.seed % 1000, prompt.prefix[0]), (-0.5, -1.5), "stop") for prompt in prompts]

    def update_weights(self, weights, version) -> None:
        raise AssertionError("not the proposer's business")


class OddRewriter:
    """Fails on every second episode."""

    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        return [
            Failed("too short", {"episode": episode.id})
            if index % 2
            else Candidate(Source.REWRITE, (70 + index,), seed=index)
            for index, episode in enumerate(episodes)
        ]


def episode(name: str, first: int = 1) -> Episode:
    return Episode(name, (first, 2), (30, 31), "corpus", "document", 2)


def proposer(**changes) -> CandidateGenerator:
    parts = {"text": NUMBERS, "original": True, "rewriter": None, "engine": None, "suffix_length": 8, "run_seed": 17}
    return CandidateGenerator(**(parts | changes))


def seeds(groups) -> dict[str, list[int]]:
    return {group.episode.id: [c.seed for c in group.candidates if c.source is Source.ROLLOUT] for group in groups}


def test_original_rewrite_and_rollouts_lie_in_that_order_in_the_group_of_their_episode():
    episodes = [episode("a", 1), episode("b", 2), episode("c", 3)]
    groups = proposer(rewriter=OddRewriter(), engine=EchoEngine()).propose(episodes, [2, 2, 2], 5)
    assert [group.episode for group in groups] == episodes
    assert [[c.source.value for c in group.candidates] for group in groups] == [
        ["original", "rewrite", "rollout", "rollout"],
        ["original", "rollout", "rollout"],
        ["original", "rewrite", "rollout", "rollout"],
    ]
    assert [group.candidates[0].tokens for group in groups] == [(30, 31)] * 3
    assert [groups[index].candidates[1].tokens for index in (0, 2)] == [(70,), (72,)]
    for group in groups:
        for rollout in group.candidates[-2:]:
            assert rollout.tokens == (rollout.seed % 1000, group.episode.prefix[0]), "the tokens of this very prompt"
    assert [group.rewrite_failure for group in groups] == [None, Failed("too short", {"episode": "b"}), None]


def test_episodes_may_have_different_numbers_of_rollouts():
    engine = EchoEngine()
    groups = proposer(engine=engine).propose([episode("a"), episode("b"), episode("c")], [0, 3, 1], 5)
    assert [len(group.candidates) - 1 for group in groups] == [0, 3, 1]
    assert len(engine.asked[0][0]) == 4


def test_rollouts_carry_their_provenance():
    engine = EchoEngine()
    groups = proposer(engine=engine).propose([episode("a")], [2], 5)
    for rollout in groups[0].candidates[1:]:
        assert (rollout.policy_version, rollout.finish_reason, rollout.logprobs) == (5, "stop", (-0.5, -1.5))
    ((prompts, max_tokens, version),) = engine.asked
    assert (max_tokens, version) == (8, 5)
    assert [prompt.seed for prompt in prompts] == [c.seed for c in groups[0].candidates[1:]]
    assert not any(prompt.greedy for prompt in prompts)


def test_rollout_seeds_depend_on_run_seed_episode_and_k_alone():
    alone = proposer(engine=EchoEngine()).propose([episode("b")], [2], 0)
    among = proposer(engine=EchoEngine()).propose([episode("a"), episode("b", 9), episode("c")], [2] * 3, 41)
    more = proposer(engine=EchoEngine(), original=False).propose([episode("b")], [5], 0)
    assert seeds(among)["b"] == seeds(alone)["b"] == seeds(more)["b"][:2]
    other = proposer(engine=EchoEngine(), run_seed=18).propose([episode("a"), episode("b")], [2, 2], 0)
    everything = [*seeds(among).values(), *seeds(other).values()]
    drawn = [seed for group in everything for seed in group]
    assert len(set(drawn)) == len(drawn) == 10, "other episodes, other k and other runs draw other tokens"


def test_seeds_fit_what_samplers_take():
    groups = proposer(engine=EchoEngine()).propose([episode("a")], [200], 0)
    assert all(0 <= seed < 2**63 for seed in seeds(groups)["a"])


@pytest.mark.parametrize(
    ("parts", "sources"),
    [
        ({}, ["original"]),
        ({"original": False, "engine": EchoEngine()}, ["rollout", "rollout"]),
        ({"original": False, "rewriter": OddRewriter()}, ["rewrite"]),
        ({"original": False}, []),
    ],
)
def test_what_is_not_offered_is_left_out(parts, sources):
    groups = proposer(**parts).propose([episode("a")], [2], 0)
    assert [candidate.source.value for candidate in groups[0].candidates] == sources


class BytesText(FakeText):
    """A token is a byte; 255 ends a text."""

    def __init__(self) -> None:
        super().__init__(lambda tokens: bytes(tokens).decode("utf-8", "ignore"), control=[255])

    def whole_characters(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        return max(n for n in range(len(tokens) + 1) if n == 0 or _is_whole(bytes(tokens[:n])))


def _is_whole(data: bytes) -> bool:
    try:
        return bool(data.rstrip(b"\xff").decode() or True)
    except UnicodeDecodeError:
        return False


class Says:
    """An engine that gives every prompt the same continuation."""

    def __init__(self, *texts: bytes) -> None:
        self.version, self.texts = 0, texts

    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        return [Continuation(tuple(text), (-1.0,) * len(text), "length") for text in self.texts[: len(prompts)]]


def test_a_rollout_that_ends_in_mid_character_loses_that_character():
    engine = Says("a語".encode(), "a語".encode()[:-1], "語".encode()[:2])
    (group,) = proposer(text=BytesText(), engine=engine).propose([episode("e", 65)], [3], 0)
    whole, broken, nothing = group.candidates[1:]
    assert (bytes(whole.tokens).decode(), bytes(broken.tokens).decode()) == ("a語", "a")
    assert len(broken.logprobs) == len(broken.tokens)
    assert (whole.blank, broken.blank, nothing.blank) == (False, False, True)


def test_candidates_without_text_are_marked():
    engine = Says(b"\xff", b" \n\t ", b" .", b"  \xff")
    (group,) = proposer(text=BytesText(), engine=engine).propose([episode("e", 65)], [4], 0)
    assert [candidate.blank for candidate in group.candidates[1:]] == [True, True, False, True]
