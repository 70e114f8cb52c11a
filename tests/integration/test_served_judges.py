"""Judges of an evaluation that ask teacher servers: configured, announced or missing, and calibration of them."""

from __future__ import annotations

import json
import logging
import random

import pytest
from hostile_server import Exchange, chat, says, serving
from judging_server import CONTINUATION
from tiny_model import WORDS

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import EndpointConfig, load_config
from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation import verdicts
from megatron_rlpt.evaluation.judges import comparison_group, open_judges
from megatron_rlpt.judge_workers.discovery import KIND, announcement
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Episode, Reward


def answer(verdict: str):
    return says(chat(json.dumps({"reasoning": "So it is.", "verdict": verdict})))


async def by_words(exchange: Exchange) -> bool | None:
    """Prefer the continuation with more different words, in either order."""
    texts = [text for _, text in CONTINUATION.findall(exchange.body["messages"][-1]["content"])]
    return await answer("1" if len(set(texts[0].split())) > len(set(texts[1].split())) else "2")(exchange)


@pytest.fixture
def settings(tiny_model, tmp_path):
    """Return a function that writes the configuration of a run with the given teacher."""

    def write(**teacher):
        sections = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(tiny_model), "dtype": "fp32"},
            "data": {"sources": [{"path": "c.jsonl"}], "max_prefix": 16, "suffix_length": 8, "min_prefix": 4},
            "train": {"steps": 1},
            "teacher": {"judge": "generative", "dtype": "fp32"} | teacher,
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(sections))
        return path

    return write


@pytest.fixture
def pairs(tmp_path):
    """A file of twelve continuations and of the same in a loop."""
    draw = random.Random(1)
    path = tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(12):
            words = draw.sample([word for word in WORDS if word.isalpha()], 9)
            good = "".join(f" {word}" for word in words[1:])
            record = {"prefix": words[0], "good": good, "bad": f" {words[1]} {words[2]}" * 4, "kind": "looped"}
            file.write(json.dumps(record) + "\n")
    return path


def groups(tiny_model):
    text = PolicyTokenizer(tiny_model)
    episode = Episode("e", tuple(text.encode("the cat")), tuple(text.encode("a")), "c", "d", 1)
    return [comparison_group(episode, [text.encode("the the"), text.encode("the dog")], text)]


def test_a_prompted_judge_is_measured_with_its_orders_and_answers(settings, pairs, rlpt):
    def measured(behavior):
        with serving(behavior) as server:
            config = settings(workers={"endpoints": [{"url": server.url}]})
            code, out, err = rlpt("judge", "calibrate", "-c", config, "--file", pairs, "--json")
            return code, json.loads(out)[0], err

    code, good, _ = measured(by_words)
    assert (code, good["rows"][0]["accuracy"], good["flips"]["accuracy"], good["remarks"]) == (0, 1.0, 0.0, [])
    assert (good["rows"][0]["verdicts"], good["answers"], good["parsed"]) == (24, 24, 24)
    code, biased, _ = measured(answer("1"))
    assert (code, biased["rows"][0]["accuracy"], biased["flips"]["accuracy"]) == (0, 0.5, 1.0)
    assert "prefers the option shown first: it wins 100% of the comparisons" in biased["remarks"]
    code, silent, err = measured(says(chat("I would rather not say.")))
    assert (code, silent["answers"], silent["parsed"]) == (TeacherError.exit_code, 24, 0)
    assert silent["remarks"] == ["none of 24 answers has a verdict: the judge cannot be used"]
    assert "judge judge: none of 24 answers has a verdict" in err


def test_an_announced_server_is_asked_once(settings, tiny_model, tmp_path):
    with serving(by_words) as server:
        config = load_config(settings(run_in="workers"))
        buffer = open_buffer(config)
        buffer.announce(KIND, "a", announcement(EndpointConfig(url=server.url)), 60.0)
        buffer.close()
        (judge,) = open_judges(config, {}, cache=tmp_path / "cache")
        (judged,) = judge.compare(groups(tiny_model), 0, "quality")
        assert [one.value for one in judged.rewards] == [0.0, 1.0]
        (reward,) = judge.judge(groups(tiny_model), 0, "quality")
        assert reward.rewards[0].value < reward.rewards[1].value
    (again,) = open_judges(config, {}, cache=tmp_path / "cache")
    assert again.compare(groups(tiny_model), 0, "quality") == [judged], "without the server"


def test_without_a_server_the_model_is_loaded_here(settings, tiny_model, monkeypatch, caplog):
    class Engine:
        name = "here"

        def generate(self, requests):
            return [Reply('{"reasoning": "", "verdict": "1"}', (1,), "stop") for _ in requests]

    monkeypatch.setattr(verdicts, "start_generator", lambda *_: Engine())
    with caplog.at_level(logging.WARNING):
        (judge,) = open_judges(load_config(settings(run_in="workers")), {})
        (judged,) = judge.compare(groups(tiny_model), 0, "quality")
    assert [one.value for one in judged.rewards if isinstance(one, Reward)] == [0.5, 0.5]
    assert "no teacher server; loading the teacher into this process" in caplog.text
