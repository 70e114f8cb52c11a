"""A real vLLM server of the teacher, started by ``rlpt teacher serve``, found in the buffer, used and killed."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_vllm_server import write_fake_vllm
from tiny_runs import write_config

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import LikelihoodConfig, load_config
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.judge_workers.client.pool import TeacherPool
from megatron_rlpt.judge_workers.discovery import KIND, announced_endpoints
from megatron_rlpt.teacher.generator import Message, Request
from megatron_rlpt.teacher.likelihood import LikelihoodJudge
from megatron_rlpt.teacher.served_likelihood import ServedLikelihoodJudge
from megatron_rlpt.teacher.verdicts.direct import ALTERNATIVES
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

VERDICT = json.dumps(
    {
        "type": "object",
        "properties": {"verdict": {"enum": ["1", "2"]}},
        "required": ["verdict"],
        "additionalProperties": False,
    }
)
TEXTS = (
    " is a small animal that people keep at home; it likes milk.",
    " potato seven under the of of of green quickly.",
    " is an animal.",
)


def serve(config: Path, **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_rlpt", "teacher", "serve", "-c", str(config), "--host", "127.0.0.1",
         "--enforce-eager"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


def await_announcement(config, server: subprocess.Popen[bytes]):
    buffer = open_buffer(config)
    deadline = time.monotonic() + 300
    while not (announced := buffer.announced(KIND)):
        assert server.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    buffer.close()
    return announced_endpoints([], announced)


@pytest.fixture(scope="module")
def config_file(smollm2, corpus, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("served")
    (base / "run").mkdir()
    return write_config(
        base / "run.yaml", smollm2, corpus, base / "run", teacher={"max_context": 256, "run_in": "workers"}
    )


@pytest.fixture(scope="module")
def server(config_file):
    running = serve(config_file)
    try:
        yield running, await_announcement(load_config(config_file), running)
    finally:
        running.terminate()
        running.wait(60)


def ask(endpoints, question, deadline: float = 120.0):
    async def work():
        async with TeacherPool(endpoints, deadline) as pool:
            await pool.wait_until_ready(deadline)
            return await question(pool)

    return asyncio.run(work())


@pytest.fixture(scope="module")
def group(smollm2) -> Group:
    encode = PolicyTokenizer(smollm2).encode
    prefix = tuple(encode("Everybody knows what a cat is. A cat"))
    tokens = [tuple(encode(text)) for text in TEXTS]
    candidates = tuple(Candidate(Source.ROLLOUT, row) for row in tokens)
    return Group(Episode("e", prefix, tokens[0], "c", "d", len(prefix)), candidates)


def test_it_answers_chats_and_keeps_to_a_schema(server):
    _, endpoints = server
    request = Request((Message("user", "Which is better, 1 or 2?"),), seed=3, max_tokens=20, json_schema=VERDICT)

    async def twice(pool):
        return await pool(request), await pool(request), pool.name

    first, second, name = ask(endpoints, twice)
    assert first.text.replace(" ", "").replace("\n", "") in {'{"verdict":"1"}', '{"verdict":"2"}'}
    assert first.finish_reason == "stop"
    assert first.text == second.text, "the same seed"
    assert first.prompt_tokens > 5
    assert name == "smollm2-135m-instruct"


def test_its_first_tokens_come_with_their_probabilities(server):
    _, endpoints = server
    question = (Message("user", "Which is larger, 1 or 2? Answer with one digit."),)
    request = Request(question, seed=3, max_tokens=1, temperature=0.0, alternatives=ALTERNATIVES)
    reply = ask(endpoints, lambda pool: pool(request))
    assert len(reply.alternatives) == ALTERNATIVES
    assert reply.alternatives[0][0] == reply.text
    probabilities = [math.exp(logprob) for _, logprob in reply.alternatives]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0.5 < sum(probabilities) < 1.001


def test_its_log_likelihood_is_that_of_the_model(server, group, smollm2):
    _, endpoints = server
    config = LikelihoodConfig()
    served = ask(
        endpoints, lambda pool: ServedLikelihoodJudge(pool.logprobs, pool.name, config).judge_group(group, pool)
    )
    (own,) = LikelihoodJudge(smollm2, config, "cpu").judge([group])
    assert all(isinstance(reward, Reward) for reward in served.rewards)
    for theirs, ours in zip(served.rewards, own.rewards, strict=True):
        assert theirs.value == pytest.approx(ours.value, abs=0.1), "bf16 on both sides, other kernels"
    ranks = [sorted(range(3), key=lambda i, r=result: r.rewards[i].value) for result in (served, own)]
    assert ranks[0] == ranks[1]


def test_a_token_that_it_does_not_know_is_no_score(server, group):
    _, endpoints = server
    odd = Group(group.episode, (group.candidates[0], Candidate(Source.ROLLOUT, (10**6,))))
    config = LikelihoodConfig()
    judged = ask(endpoints, lambda pool: ServedLikelihoodJudge(pool.logprobs, pool.name, config).judge_group(odd, pool))
    assert isinstance(judged.rewards[0], Reward)
    assert isinstance(judged.rewards[1], Failed)


def test_a_deadline_that_it_cannot_keep_is_refused_with_one_that_it_can(server):
    _, endpoints = server
    with pytest.raises(ConfigError, match=r"request_deadline is 60 s, but .* a second, so 1000000 tokens take"):
        ask(endpoints, lambda pool: pool.check_deadline(1_000_000), deadline=60.0)


def test_judge_try_prints_scores_best_first(server, config_file, rlpt):
    _, endpoints = server
    code, out, err = rlpt(
        "judge", "try", "-c", config_file, "--url", endpoints[0].url,
        "--prefix", "Everybody knows what a cat is. A cat", *(part for text in TEXTS for part in ("--candidate", text)),
    )  # fmt: skip
    assert code == 0, err
    shown = [line for line in out.splitlines() if "]  " in line or "] " in line]
    assert len(shown) == 3
    values = [float(line.split()[0]) for line in shown]
    assert values == sorted(values, reverse=True)
    assert "[1]" in shown[-1], "the nonsense"


def test_killed_it_leaves_nothing_behind_and_its_successor_is_found(server, config_file, tmp_path):
    """Last in this module, because it ends the server of the other tests."""
    running, _ = server
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert children
    running.send_signal(signal.SIGKILL)
    running.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "vLLM's server outlives the one that started it"
        time.sleep(0.2)
    packages = os.pathsep.join([str(write_fake_vllm(tmp_path)), *sys.path])
    successor = serve(config_file, PYTHONPATH=packages, STARTED=str(tmp_path / "started.json"))
    try:
        buffer = open_buffer(load_config(config_file))
        deadline = time.monotonic() + 120
        while True:
            endpoints = announced_endpoints([], buffer.announced(KIND))
            if any(is_up(endpoint) for endpoint in endpoints):
                break
            assert time.monotonic() < deadline
            time.sleep(0.5)
        buffer.close()
    finally:
        successor.terminate()
        assert successor.wait(60) == 0
    assert not [e for e in announced_endpoints([], open_buffer(load_config(config_file)).announced(KIND)) if is_up(e)]


def is_up(endpoint) -> bool:
    async def ready(pool):
        return True

    async def work():
        async with TeacherPool([endpoint], 5.0) as pool:
            try:
                await pool.wait_until_ready(2.0)
            except Exception:
                return False
            return await ready(pool)

    return asyncio.run(work())
