"""The client with misbehaving servers: no hang past the deadline, no invented reply, no stampede."""

import asyncio
import gc
import math
import time
import warnings
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hostile_server import (
    HostileServer,
    chat,
    drip,
    half,
    hang,
    hang_in_body,
    hang_in_complaint,
    huge,
    ok,
    refuses,
    reset,
    says,
    slow,
)

from megatron_rlpt.config import EndpointConfig
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.judge_workers.client.breaker import Breaker, State
from megatron_rlpt.judge_workers.client.pool import TeacherPool
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.types import Failed

QUESTION = Request((Message("user", "Which is better?"),), seed=1, max_tokens=64)
GOOD = Reply("fine", (), "stop", prompt_tokens=7, answer_tokens=1)
LONG = 20.0
"""A deadline that only a hanging client reaches."""
SHORT = 0.8
SLACK = 5.0
"""Seconds that a slow machine may add."""


def impatient() -> Breaker:
    return Breaker(failures=3, first=0.05, longest=0.1)


def patient() -> Breaker:
    return Breaker(failures=1000)


@asynccontextmanager
async def asking(*servers, deadline=LONG, breaker=patient, **settings):
    """Yield a pool of running servers, all of them discovered."""
    async with TeacherPool(
        [EndpointConfig(server.url, **settings) for server in servers], deadline, breaker=breaker
    ) as pool:
        await pool.wait_until_ready(LONG)
        await until(lambda: all(endpoint.breaker.closed for endpoint in pool.endpoints))
        yield pool


async def until(condition):
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.01)


def ask(*script, deadline=LONG, breaker=patient, request=QUESTION, **settings):
    """Send one request to a server that follows ``script``; return reply or failure, seconds, and the server."""

    async def run():
        async with (
            HostileServer(list(script)) as server,
            asking(server, deadline=deadline, breaker=breaker, **settings) as pool,
        ):
            began = time.monotonic()
            reward = await pool(request)
            return reward, time.monotonic() - began, server

    return asyncio.run(run())


def test_good_reply():
    reward, _, server = ask(ok)
    assert reward == GOOD
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.body["model"] == "teacher"
    assert request.body["seed"] == 1


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (refuses(500), "server error"),
        (refuses(503), "server error"),
        (refuses(429), "server busy"),
        (refuses(408), "server busy"),
        (refuses(409), "server busy"),
        (refuses(425), "server busy"),
        (reset, "connection broken"),
        (half, "connection broken"),
        (says(chat(finish_reason="abort")), "connection broken"),
    ],
)
def test_transient_faults_are_repeated_until_the_deadline_and_no_longer(behaviour, reason):
    for _ in range(3):
        reward, seconds, server = ask(behaviour, deadline=SHORT)
        assert isinstance(reward, Failed)
        if reward.reason != "deadline exceeded":  # as where the last attempt is still under way
            break
    assert reward.reason == reason
    assert reward.detail["attempts"] == len(server.requests) >= 2
    assert seconds < SHORT + SLACK


@pytest.mark.parametrize("behaviour", [refuses(500), refuses(429), reset, half, hang_in_complaint])
def test_a_transient_fault_that_goes_away_costs_only_time(behaviour):
    reward, _, server = ask(behaviour, behaviour, ok)
    assert reward == GOOD
    assert len(server.requests) == 3
    assert all(request.body == server.requests[0].body for request in server.requests)


@pytest.mark.parametrize(
    ("behaviour", "reason", "said"),
    [
        (refuses(400, message="too long"), "request rejected", "too long"),
        (refuses(401, message="who are you"), "access denied", "who are you"),
        (refuses(403), "access denied", "no"),
        (refuses(404, message="no such model"), "model or address not found", "no such model"),
        (refuses(413), "request rejected", "no"),
        (says({"detail": "not so"}, 422), "request rejected", "not so"),
        (says(b"<html>teapot</html>", 418), "request rejected", "teapot"),
        (says({}, 302, "Location: http://127.0.0.1:9/\r\n"), "unexpected status", "{}"),
    ],
)
def test_what_will_not_change_fails_at_once_with_the_servers_words(behaviour, reason, said):
    reward, _, server = ask(behaviour)
    assert isinstance(reward, Failed)
    assert reward.reason == reason
    assert reward.detail["message"] == said
    assert reward.detail["server"] == server.url
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (says(b"certainly! the first one"), "reply is not JSON"),
        (says(b"\xff\xfe\x00"), "reply is not JSON"),
        (says(b"[" * 100_000), "reply is not JSON"),
        (says(b""), "reply is not JSON"),
        (says({"result": "fine"}), "reply of the wrong shape"),
        (says({"choices": []}), "reply of the wrong shape"),
        (says(chat(None)), "reply of the wrong shape"),
        (says(chat([7])), "reply of the wrong shape"),
        (says(chat("\ud800")), "reply of the wrong shape"),
        (says(chat(finish_reason=None) | {"usage": None}), "reply of the wrong shape"),
        (says(chat(None, finish_reason="tool_calls")), "reply of the wrong shape"),
        (says(chat(finish_reason="content_filter")), "refused"),
        (says(chat(message={"content": None, "refusal": "I would rather not."})), "refused"),
        (huge, "reply too large"),
    ],
)
def test_no_reply_is_made_out_of_what_is_none(behaviour, reason):
    reward, _, server = ask(behaviour)
    assert isinstance(reward, Failed)
    assert reward.reason == reason
    assert len(server.requests) == 1


@pytest.mark.parametrize("behaviour", [hang, hang_in_body, drip, slow(60)])
def test_a_server_that_hangs_is_left_at_the_deadline(behaviour):
    async def run():
        async with HostileServer([behaviour]) as server, asking(server, deadline=SHORT) as pool:
            began = time.monotonic()
            reward = await pool(QUESTION)
            assert time.monotonic() - began < SHORT + SLACK
            assert reward == Failed("deadline exceeded", {"deadline": SHORT, "server": server.url, "attempts": 1})
            assert len(server.requests) == 1
            assert pool.endpoints[0].in_flight == 0

    asyncio.run(run())


def test_slow_is_no_fault():
    assert ask(slow(0.5))[0] == GOOD


def test_a_server_is_left_alone_for_as_many_seconds_as_it_says():
    reward, seconds, server = ask(refuses(429, "Retry-After: 1\r\n"), ok)
    assert reward == GOOD
    assert seconds >= 1.0
    assert len(server.requests) == 2


def test_a_server_is_left_alone_until_the_date_it_says():
    async def behave(exchange):
        nonlocal until_then
        until_then = math.ceil(time.time()) + 1
        date = format_datetime(datetime.fromtimestamp(until_then, UTC), usegmt=True)
        return await refuses(429, f"Retry-After: {date}\r\n")(exchange)

    until_then = 0
    reward, _, server = ask(behave, ok)
    assert reward == GOOD
    assert time.time() >= until_then - 0.1
    assert len(server.requests) == 2


@pytest.mark.parametrize("wait", ["3600", "9" * 400])
def test_nobody_waits_for_a_time_after_the_deadline(wait):
    deadline = 60.0
    reward, seconds, server = ask(refuses(429, f"Retry-After: {wait}\r\n"), ok, deadline=deadline)
    assert isinstance(reward, Failed)
    assert reward.reason == "server busy"
    assert seconds < deadline
    assert len(server.requests) == 1


@pytest.mark.parametrize("wait", ["soon", "-5", ""])
def test_a_wait_that_is_none_is_ignored(wait):
    assert isinstance(ask(refuses(429, f"Retry-After: {wait}\r\n"), ok)[0], Reply)


def test_the_other_server_is_asked_when_one_fails():
    async def run():
        async with HostileServer([refuses(500)]) as bad, HostileServer() as good, asking(bad, good) as pool:
            rewards = await asyncio.gather(*(pool(QUESTION) for _ in range(20)))
            assert all(isinstance(reward, Reply) for reward in rewards)
            assert len(good.requests) == 20
            # No request returns to the failed server while another is available.
            assert 0 < len(bad.requests) <= 20
            by_url = {endpoint.url: endpoint.counters for endpoint in pool.endpoints}
            assert by_url[bad.url].failures == {"server error": len(bad.requests)}
            assert by_url[good.url].retries == len(bad.requests)

    asyncio.run(run())


def test_the_other_server_is_asked_when_one_is_gone():
    async def run():
        async with HostileServer() as bad, HostileServer() as good, asking(bad, good) as pool:
            await bad.stop()
            rewards = await asyncio.gather(*(pool(QUESTION) for _ in range(20)))
            assert all(isinstance(reward, Reply) for reward in rewards)
            assert len(good.requests) == 20

    asyncio.run(run())


def test_a_server_that_denies_access_does_not_swallow_the_work_of_the_others():
    """It fails faster than the others answer, so it would always be the least loaded."""

    async def run():
        async with (
            HostileServer([refuses(401)]) as bad,
            HostileServer([slow(0.02)]) as good,
            asking(bad, good, breaker=lambda: Breaker(failures=3)) as pool,
        ):
            rewards = [await pool(QUESTION) for _ in range(12)]
            assert sum(isinstance(reward, Failed) for reward in rewards) == len(bad.requests) == 3
            assert not pool.all_down

    asyncio.run(run())


def test_faults_of_requests_are_none_of_the_server():
    async def run():
        async with HostileServer([refuses(400)]) as server, asking(server, breaker=impatient) as pool:
            for _ in range(6):
                assert isinstance(await pool(QUESTION), Failed)
            assert len(server.requests) == 6
            assert not pool.all_down

    asyncio.run(run())


def test_room_is_not_lost_with_whom_it_was_meant_for():
    async def run():
        async def first():
            await pool(QUESTION)
            # The second is awake but has not run yet.
            second.cancel()

        async with HostileServer([slow(0.1)]) as server, asking(server, concurrency=1) as pool:
            leads = asyncio.create_task(first())
            await until(lambda: server.busy == 1)
            second = asyncio.create_task(pool(QUESTION))
            await until(lambda: pool.waiting == 1)
            third = asyncio.create_task(pool(QUESTION))
            await until(lambda: pool.waiting == 2)
            await leads
            async with asyncio.timeout(LONG):
                assert await third == GOOD
            assert second.cancelled()
            assert len(server.requests) == 2

    asyncio.run(run())


def test_no_more_than_the_concurrency_is_under_way():
    async def run():
        async with HostileServer([slow(0.05)]) as server, asking(server, concurrency=3) as pool:
            work = [asyncio.create_task(pool(QUESTION)) for _ in range(12)]
            await until(lambda: pool.waiting == 9)
            assert pool.endpoints[0].in_flight == 3
            rewards = await asyncio.gather(*work)
            assert all(isinstance(reward, Reply) for reward in rewards)
            assert server.peak == 3
            assert pool.waiting == pool.endpoints[0].in_flight == 0

    asyncio.run(run())


def test_waiting_for_room_does_not_count_against_the_deadline():
    async def run():
        async with HostileServer([slow(0.4)]) as server, asking(server, concurrency=1, deadline=1.5) as pool:
            rewards = await asyncio.gather(*(pool(QUESTION) for _ in range(6)))
            assert all(isinstance(reward, Reply) for reward in rewards)

    asyncio.run(run())


def test_requests_go_out_by_weight():
    async def run():
        async with HostileServer() as small, HostileServer() as large:
            endpoints = [EndpointConfig(small.url, weight=1.0), EndpointConfig(large.url, weight=3.0)]
            async with TeacherPool(endpoints, LONG) as pool:
                await until(lambda: all(endpoint.breaker.closed for endpoint in pool.endpoints))
                for _ in range(40):
                    await pool(QUESTION)
                assert (len(small.requests), len(large.requests)) == (10, 30)
                for server in (small, large):
                    server.requests.clear()
                    server.script = [hang]
                work = [asyncio.create_task(pool(QUESTION)) for _ in range(16)]
                await until(lambda: small.busy + large.busy == 16)
                assert (small.busy, large.busy) == (4, 12)
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)

    asyncio.run(run())


def test_requests_about_an_episode_go_to_one_server_as_long_as_it_has_room():
    async def run():
        async with (
            HostileServer([slow(0.02)]) as first,
            HostileServer([slow(0.02)]) as second,
            asking(first, second, concurrency=4) as pool,
        ):

            async def about(episode):
                return [await pool(replace(QUESTION, episode=episode)) for _ in range(6)]

            await asyncio.gather(*map(about, "abcd"))
            seen = [len(server.requests) for server in (first, second)]
            replies = await asyncio.gather(*(pool(replace(QUESTION, episode="e")) for _ in range(16)))
            return seen, [len(first.requests) - seen[0], len(second.requests) - seen[1]], replies

    seen, full, replies = asyncio.run(run())
    assert seen == [12, 12], "two episodes each, whose six requests stay together"
    assert all(full), "and a full server does not keep them waiting"
    assert sum(full) == len([reply for reply in replies if reply == GOOD]) == 16


def test_another_server_takes_over_an_episode_whose_server_fails():
    async def run():
        async with (
            HostileServer([ok, refuses(500)]) as first,
            HostileServer([ok]) as second,
            asking(first, second) as pool,
        ):
            # One of them is asked first about a, the other one about b.
            for episode in "ab":
                await pool(replace(QUESTION, episode=episode))
            return [await pool(replace(QUESTION, episode=episode)) for episode in "abab"]

    assert asyncio.run(run()) == [GOOD] * 4


def test_cached_tokens_are_read_where_a_server_tells():
    for usage, cached in (
        ({"prompt_tokens_details": {"cached_tokens": 5}}, 5),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, 0),
        ({"prompt_tokens_details": None}, None),
        ({"cache_read_input_tokens": 3}, 3),
        ({"prompt_cache_hit_tokens": 4}, 4),
        ({"prompt_tokens_details": {"cached_tokens": "many"}}, 0),
    ):
        body = chat()
        body["usage"] |= usage
        reply, _, _ = ask(says(body))
        assert reply == replace(GOOD, cached_tokens=cached), usage


def test_workers_that_come_up_together_do_not_all_begin_with_the_same_server():
    async def run():
        async with HostileServer() as one, HostileServer() as other:
            for _ in range(30):
                async with TeacherPool([EndpointConfig(one.url), EndpointConfig(other.url)], LONG) as pool:
                    await until(lambda pool=pool: all(endpoint.breaker.closed for endpoint in pool.endpoints))
                    await pool(QUESTION)
            assert len(one.requests) + len(other.requests) == 30
            assert one.requests
            assert other.requests, "thirty workers agree by chance once in a billion times"

    asyncio.run(run())


def test_the_breaker_opens_probes_and_closes():
    async def run():
        async with HostileServer([refuses(500)]) as server, asking(server, breaker=impatient) as pool:
            server.probe = refuses(500)
            work = [asyncio.create_task(pool(QUESTION)) for _ in range(10)]
            await until(lambda: pool.all_down and not pool.endpoints[0].in_flight)
            sent, probes = len(server.requests), server.probes
            # While it is down: only probes, one at a time.
            await until(lambda: server.probes >= probes + 3)
            assert len(server.requests) == sent
            assert pool.endpoints[0].last_problem.fault == "server error"
            server.script, server.probe = [ok], ok
            rewards = await asyncio.gather(*work)
            assert all(isinstance(reward, Reply) for reward in rewards)
            assert pool.endpoints[0].breaker.state == State.CLOSED
            assert not pool.all_down

    asyncio.run(run())


def test_a_server_that_is_restarted_is_found_again():
    async def run():
        async with HostileServer() as server, asking(server, breaker=impatient) as pool:
            assert isinstance(await pool(QUESTION), Reply)
            await server.stop()
            work = [asyncio.create_task(pool(QUESTION)) for _ in range(10)]
            await until(lambda: pool.all_down)
            await server.start()
            assert all(isinstance(reward, Reply) for reward in await asyncio.gather(*work))

    asyncio.run(run())


def test_a_server_that_comes_and_goes():
    async def run():
        script = [ok, refuses(503), refuses(503), refuses(503), ok, reset] * 10
        async with HostileServer(script) as server, asking(server, breaker=impatient) as pool:
            rewards = [await pool(QUESTION) for _ in range(4)]
            assert all(isinstance(reward, Reply) for reward in rewards)

    asyncio.run(run())


def test_nobody_waits_for_ever_when_all_servers_are_down():
    async def run():
        async with (
            HostileServer([hang]) as server,
            asking(server, deadline=SHORT, breaker=impatient, concurrency=3) as pool,
        ):
            server.probe = hang
            began = time.monotonic()
            rewards = await asyncio.gather(*(pool(QUESTION) for _ in range(9)))
            # Three hang, then the server counts as down, and the others wait meanwhile.
            assert time.monotonic() - began < 2 * SHORT + SLACK
            reasons = [reward.reason for reward in rewards]
            assert reasons.count("deadline exceeded") >= 3, "or more: who waited for those three has a deadline as well"
            assert set(reasons) == {"deadline exceeded", "no teacher server available"}
            assert len(server.requests) < 9, "the others were not sent"
            assert pool.all_down

    asyncio.run(run())


def test_nothing_is_sent_to_a_server_that_never_answered():
    async def run():
        async with (
            HostileServer(probe=refuses(503)) as loading,
            TeacherPool([EndpointConfig(loading.url)], SHORT, breaker=impatient) as pool,
        ):
            assert pool.all_down
            with pytest.raises(TeacherError) as caught:
                await pool.wait_until_ready(0.3)
            assert (
                str(caught.value) == f"no teacher server was ready within 0.3 s ({loading.url}: server error: 503: no)"
            )
            assert (await pool(QUESTION)).reason == "no teacher server available"
            assert not loading.requests
            loading.probe = ok
            await pool.wait_until_ready(LONG)
            assert pool.name == "teacher"
            assert isinstance(await pool(QUESTION), Reply)

    asyncio.run(run())


@pytest.mark.parametrize("behaviour", [hang, hang_in_body])
def test_cancelling_closes_the_connection(behaviour):
    async def run():
        async with HostileServer([behaviour]) as server, asking(server, concurrency=2) as pool:
            work = [asyncio.create_task(pool(QUESTION)) for _ in range(4)]
            await until(lambda: server.busy == 2 and pool.waiting == 2)
            for task in work:
                task.cancel()
            for reward in await asyncio.gather(*work, return_exceptions=True):
                assert isinstance(reward, asyncio.CancelledError)
            # The connection of the probe may be reused for the next request.
            await until(lambda: server.busy == 0 and server.open <= 1)
            assert pool.endpoints[0].in_flight == pool.waiting == 0
            server.script = [ok]
            assert isinstance(await pool(QUESTION), Reply)
            # An error of the client does not count against the server.
            assert not pool.endpoints[0].counters.failures
        await server.until_open(0)

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        asyncio.run(run())
        gc.collect()


def test_servers_come_and_go_while_requests_are_under_way():
    async def run():
        async with HostileServer([slow(0.3)]) as old, HostileServer() as new, asking(old) as pool:
            before = pool.endpoints[0]
            under_way = asyncio.create_task(pool(QUESTION))
            await until(lambda: old.busy == 1)
            pool.update([EndpointConfig(new.url)])
            assert pool.all_down  # not yet tried
            assert isinstance(await pool(QUESTION), Reply)
            assert isinstance(await under_way, Reply)
            assert (len(old.requests), len(new.requests)) == (1, 1)
            await old.until_open(0)
            kept = pool.endpoints[0]
            assert kept is not before
            pool.update([EndpointConfig(new.url + "/"), EndpointConfig(old.url)])
            await until(lambda: all(endpoint.breaker.closed for endpoint in pool.endpoints))
            await asyncio.gather(*(pool(QUESTION) for _ in range(4)))
            assert len(old.requests) == 3

    asyncio.run(run())


def test_the_key_is_sent_and_never_said(monkeypatch, caplog):
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    reward, _, server = ask(refuses(401, message="bad key sk-very-secret"), ok, api_key_env="TEACHER_KEY")
    assert server.requests[0].headers["authorization"] == "Bearer sk-very-secret"
    assert reward.detail["message"] == "bad key <key>"
    assert "secret" not in repr(reward) + caplog.text


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines"])
def test_a_key_that_is_none_is_an_error_before_anything_is_sent(monkeypatch, value):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(ConfigError, match="TEACHER_KEY") as caught:
        ask(ok, api_key_env="TEACHER_KEY")
    assert "two" not in str(caught.value)


SCHEMA = '{"type": "object"}'


def test_a_server_without_schemas_is_asked_without_and_remembered():
    async def run():
        script = [refuses(400, message="response_format json_schema is not supported"), ok]
        async with HostileServer(script) as server, asking(server) as pool:
            request = replace(QUESTION, json_schema=SCHEMA)
            assert isinstance(await pool(request), Reply)
            assert isinstance(await pool(request), Reply)
            assert ["response_format" in exchange.body for exchange in server.requests] == [True, False, False]
            assert server.requests[0].body["response_format"]["json_schema"]["schema"] == {"type": "object"}

    asyncio.run(run())


def test_a_refused_schema_is_said_once_and_others_are_still_tried(caplog):
    async def run():
        async with HostileServer([refuses(400, message="bad json_schema"), ok]) as server, asking(server) as pool:
            for schema in (SCHEMA, SCHEMA, '{"type": "array"}'):
                await pool(replace(QUESTION, json_schema=schema))
            assert ["response_format" in exchange.body for exchange in server.requests] == [True, False, False, True]

    asyncio.run(run())
    assert sum("JSON schema" in record.getMessage() for record in caplog.records) == 1


def test_another_complaint_about_a_request_with_a_schema_is_a_failure():
    reward, _, server = ask(refuses(400, message="prompt too long"), ok, request=replace(QUESTION, json_schema=SCHEMA))
    assert reward.reason == "request rejected"
    assert len(server.requests) == 1


def scored(logprob: object = -0.5, **more: object) -> dict:
    entries = [None, {"11": {"logprob": -0.25}}, {"9": {"logprob": -0.1}, "12": {"logprob": logprob}}]
    return {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": entries} | more]}


def score(*script, first=1):
    async def run():
        async with HostileServer(list(script)) as server, asking(server) as pool:
            return await pool.logprobs([10, 11, 12], first), server

    return asyncio.run(run())


def test_likelihood_of_given_tokens():
    reward, server = score(says(scored()))
    assert reward == [-0.25, -0.5]
    assert server.requests[0].path == "/v1/completions"
    assert server.requests[0].body["prompt"] == [10, 11, 12]
    assert score(refuses(500), says(scored()), first=2)[0] == [-0.5]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (scored(math.nan), "log-probability is not finite"),
        (scored(-math.inf), "log-probability is not finite"),
        (scored(-9999.0), "log-probability is not finite"),
        (scored(3.0), "log-probability is not finite"),
        (scored("-0.5"), "reply of the wrong shape"),
        (scored(prompt_logprobs=None), "reply of the wrong shape"),
        (scored(prompt_logprobs=[None, {"11": {"logprob": -0.25}}]), "reply of the wrong shape"),
        (
            scored(prompt_logprobs=[None, {"11": {"logprob": -0.25}}, {"9": {"logprob": -1}}]),
            "reply of the wrong shape",
        ),
        ({}, "reply of the wrong shape"),
    ],
)
def test_no_likelihood_is_made_up(body, reason):
    reward, server = score(says(body))
    assert isinstance(reward, Failed)
    assert reward.reason == reason
    assert len(server.requests) == 1


def counted(exchange):
    body = chat() | {"usage": {"prompt_tokens": 7, "completion_tokens": exchange.tokens}}
    return slow_says(body)(exchange)


def slow_says(body):
    async def behave(exchange):
        await asyncio.sleep(0.2)
        return await says(body)(exchange)

    return behave


def test_a_deadline_too_short_for_the_answer_is_refused():
    async def run():
        async with HostileServer([counted]) as server, asking(server, deadline=10.0) as pool:
            await pool.check_deadline(64)
            (measured,) = server.requests
            assert measured.body["ignore_eos"] is True
            # 32 tokens in at least 0.2 s are at most 160 a second.
            with pytest.raises(ConfigError, match=r"request_deadline is 10 s, .* 1000000 tokens take .* at least \d+"):
                await pool.check_deadline(1_000_000)
            assert len(server.requests) == 1
            # What was learnt about a server is no reason to take it for another one.
            kept = pool.endpoints
            pool.update([EndpointConfig(server.url)])
            assert pool.endpoints == kept

    asyncio.run(run())


def test_a_speed_that_cannot_be_measured_is_said():
    async def run():
        async with HostileServer([refuses(500)]) as server, asking(server) as pool:
            with pytest.raises(TeacherError, match="server error; set its tokens_per_second"):
                await pool.check_deadline(64)

    asyncio.run(run())


def test_fields_that_only_vllm_knows_are_sent_to_vllm_only():
    async def run(owner):
        async with HostileServer(owner=owner) as server, asking(server) as pool:
            await pool(QUESTION)
            return server.requests[0].body

    assert asyncio.run(run("vllm"))["repetition_penalty"] == 1.0
    assert "repetition_penalty" not in asyncio.run(run("openai"))


def test_counters():
    async def run():
        async with HostileServer([refuses(429), ok, refuses(400)]) as server, asking(server) as pool:
            await pool(QUESTION)
            await pool(QUESTION)
            counters = pool.endpoints[0].counters
            assert (counters.requests, counters.retries) == (3, 1)
            assert counters.failures == {"server busy": 1, "request rejected": 1}
            assert counters.seconds > 0

    asyncio.run(run())
