"""A judge worker whose judge and rewriter are two models, each on a server of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest
from hostile_server import Exchange, chat, says, serving
from judging_server import judge_texts

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import Config, EndpointConfig, Role, load_config
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.judge_workers import serve
from megatron_rlpt.judge_workers.discovery import KIND, announcement
from megatron_rlpt.teacher.settings_fingerprint import SETTINGS, settings_fingerprint
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Group, Reward, Source

REWRITE = " the dog has a cat and the dog has a cat and the dog has a cat"


@pytest.fixture
def config(tiny_model, tmp_path) -> Config:
    sections = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tiny_model), "dtype": "fp32"},
        "data": {"sources": [{"path": "c.jsonl"}], "max_prefix": 16, "suffix_length": 4, "min_prefix": 2},
        "train": {"steps": 1},
        "candidates": {"rewrite": True, "rollouts": 1},
        "teacher": {
            "judge": "generative",
            "dtype": "fp32",
            "run_in": "workers",
            "path": str(tmp_path / "judges/export"),
            "rewriter": {"path": str(tmp_path / "rewriters/export")},
            "workers": {"metrics_port": -1},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sections))
    return load_config(path)


@pytest.fixture
def buffer(config):
    """The rollout buffer of a trainer that has put one group."""
    found = open_buffer(config)
    text = PolicyTokenizer(config.model.path)
    episode = Episode("e", tuple(text.encode("the cat")), tuple(text.encode(" the dog has a")), "c", "d", 2)
    candidates = (Candidate(Source.ORIGINAL, episode.suffix), Candidate(Source.ROLLOUT, tuple(text.encode(" a cat"))))
    token = found.attach("run", 0, capacity=10, max_attempts=2)
    found.put(token, [(0, Group(episode, candidates))])
    found.announce(SETTINGS, "trainer", settings_fingerprint(config), 600.0)
    yield found, token
    found.close()


def announce(buffer, name: str, url: str, *roles: Role) -> None:
    buffer.announce(KIND, name, announcement(EndpointConfig(url, tokens_per_second=1000.0), roles), 600.0)


def work(config: Config, until=lambda: False) -> None:
    """Run a worker until it fails or ``until`` holds."""

    async def run() -> None:
        working = asyncio.create_task(serve._run(config, "one"))
        async with asyncio.timeout(120):
            while not working.done() and not await asyncio.to_thread(until):
                await asyncio.sleep(0.05)
            if not working.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await working

    asyncio.run(run())


def prompts(server) -> list[str]:
    return [exchange.body["messages"][0]["content"] for exchange in server.requests]


def test_each_model_is_asked_for_its_own_role_alone(config, buffer):
    groups, token = buffer
    same_name = {"model": "export"}
    with (
        serving(judge_texts, root=config.teacher.path, **same_name) as judge,
        serving(says(chat(REWRITE)), root=config.teacher.rewriter.path, **same_name) as rewriter,
    ):
        announce(groups, "j", judge.url, Role.judge)
        announce(groups, "r", rewriter.url, Role.rewriter)
        work(config, lambda: groups.stats().finished == 1)
        assert len(rewriter.requests) == 1
        assert len(judge.requests) >= 2
        assert not [prompt for prompt in prompts(judge) if "rewrite" in prompt.lower()]
    (judged,) = groups.take(token, 0, 1)
    assert [one.source for one in judged.candidates] == [Source.ORIGINAL, Source.REWRITE, Source.ROLLOUT]
    assert all(isinstance(reward, Reward) for reward in judged.rewards)


def test_a_missing_server_is_named_by_its_role(config, buffer, monkeypatch):
    monkeypatch.setattr(serve, "_READY", 2.0)
    with serving(judge_texts) as judge:
        announce(buffer[0], "j", judge.url, Role.judge)
        with pytest.raises(TeacherError) as caught:
            work(config)
    assert str(caught.value) == (
        "no server of the rewriter was ready within 2 s (there is none in teacher.rewriter.endpoints, and none is "
        "announced; start one with rlpt teacher serve --role rewriter)"
    )


def test_a_rewriters_server_with_the_judges_model_is_refused(config, buffer):
    with serving(judge_texts, root="/models/export") as judge, serving(judge_texts, root="/models/export/") as rewriter:
        announce(buffer[0], "j", judge.url, Role.judge)
        announce(buffer[0], "r", rewriter.url, Role.rewriter)
        with pytest.raises(ConfigError) as caught:
            work(config)
    assert str(caught.value).startswith(
        f"the rewriter's server {rewriter.url} serves /models/export/, the model of the judge's server {judge.url}, but"
    )


async def by_model(exchange: Exchange) -> bool | None:
    return await (says(chat(REWRITE)) if exchange.body["model"] == "base" else judge_texts)(exchange)


def test_an_adapter_beside_its_base_has_one_address_and_two_names(config, buffer):
    groups, token = buffer
    with serving(by_model, owner="vllm") as server:
        for name, role in (("adapter", Role.judge), ("base", Role.rewriter)):
            endpoint = EndpointConfig(server.url, name, tokens_per_second=1000.0)
            groups.announce(KIND, f"one/{role}", announcement(endpoint, [role]), 600.0)
        work(config, lambda: groups.stats().finished == 1)
        asked = [exchange.body["model"] for exchange in server.requests]
    assert asked.count("base") == 1
    assert set(asked) == {"base", "adapter"}
    (judged,) = groups.take(token, 0, 1)
    assert {reward.judge.rpartition("/")[2] for reward in judged.rewards} == {"adapter"}
