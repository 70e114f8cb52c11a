"""Engines of a trainer that judges by itself: one per model of the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlpt.config import Config, load_config
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.teacher import build
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source


class Engine:
    """Notes what it is asked, and answers with a rewrite or a verdict."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.prompts: list[str] = []

    def generate(self, requests):
        self.prompts += [request.prompt[0].content for request in requests]
        return [Reply('{"reasoning": "", "verdict": "1"}', (1,), "stop") for _ in requests]


@pytest.fixture
def engines(monkeypatch) -> dict[str, Engine]:
    """Folder -> engine, for those that are started; starting one twice fails."""
    started: dict[str, Engine] = {}

    def start(config, model, ranks):
        assert model.path not in started
        return started.setdefault(model.path, Engine(Path(model.path).name))

    monkeypatch.setattr(build, "start_generator", start)
    return started


def config_of(model: Path, *overrides: str) -> Config:
    minimal = (f"model.path={model}", "run.dir=r", "train.steps=1", "data.sources=[{path: c}]", "teacher.dtype=fp32")
    return load_config(None, [*minimal, "data.suffix_length=2", "candidates.rewrite=true", *overrides])


def judge_and_rewrite(teacher: build.Teacher, model: Path) -> None:
    text = PolicyTokenizer(model)
    episode = Episode("e", tuple(text.encode("the cat")), tuple(text.encode(" the dog")), "c", "d", 2)
    rollout = Candidate(Source.ROLLOUT, tuple(text.encode(" a cat")))
    teacher.judge.judge([Group(episode, (Candidate(Source.ORIGINAL, episode.suffix), rollout))])
    (rewrite,) = teacher.rewriter.rewrite([episode])
    assert isinstance(rewrite, Candidate | Failed)


def is_rewrite(prompt: str) -> bool:
    return "[begin passage" in prompt


def test_two_models_have_two_engines_which_are_asked_for_their_role_alone(tiny_model, engines):
    config = config_of(tiny_model, "teacher.judge=generative", "teacher.path=/j", "teacher.rewriter.path=/w")
    judge_and_rewrite(build.build_teacher(config, "cpu", Ranks()), tiny_model)
    assert set(engines) == {"/j", "/w"}
    assert [is_rewrite(prompt) for prompt in engines["/w"].prompts] == [True]
    assert engines["/j"].prompts
    assert not any(map(is_rewrite, engines["/j"].prompts))


def test_one_model_has_one_engine_for_both_roles(tiny_model, engines):
    config = config_of(tiny_model, "teacher.judge=generative", "teacher.path=/t")
    judge_and_rewrite(build.build_teacher(config, "cpu", Ranks()), tiny_model)
    assert set(engines) == {"/t"}
    assert {is_rewrite(prompt) for prompt in engines["/t"].prompts} == {True, False}


def test_a_judge_by_likelihood_needs_no_engine_beside_that_of_the_rewriter(tiny_model, engines):
    config = config_of(tiny_model, "teacher.rewriter.path=/w")
    judge_and_rewrite(build.build_teacher(config, "cpu", Ranks()), tiny_model)
    assert set(engines) == {"/w"}
