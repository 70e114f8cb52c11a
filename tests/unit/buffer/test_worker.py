"""A judge worker with a real store and a scripted teacher."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from dataclasses import replace

import pytest
from buffer_groups import group, items

from megatron_rlpt.config import WorkersConfig
from megatron_rlpt.errors import ConfigError, ModelError
from megatron_rlpt.judge_workers.client.faults import Fault
from megatron_rlpt.judge_workers.group_processor import GroupProcessor, request_key
from megatron_rlpt.judge_workers.metrics import WorkerMetrics
from megatron_rlpt.judge_workers.worker import Worker
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.types import Candidate, Failed, Reward, Source

REASON = Fault.SERVER.value


class ScriptedTeacher:
    """Answers every request with ``answer(request)``, and counts requests."""

    name = "scripted"

    def __init__(self, answer=lambda request: "yes") -> None:
        self.all_down = False
        self.asked: list[Request] = []
        self.answer = answer

    async def __call__(self, request: Request) -> Reply | Failed:
        self.asked.append(request)
        answer = self.answer(request)
        answer = await answer if asyncio.iscoroutine(answer) else answer
        return answer if isinstance(answer, Failed) else Reply(answer, (1, 2), "stop", 5)


class AskingJudge:
    """Asks one question per candidate; the length of the answer is the reward, no answer is a failure."""

    async def judge_group(self, group, ask):
        rewards = []
        for index, candidate in enumerate(group.candidates):
            text = f"{group.episode.id} {index} {candidate.tokens}"
            reply = await ask(Request((Message("user", text),), seed=index, max_tokens=5))
            rewards.append(reply if isinstance(reply, Failed) else Reward(float(len(reply.text)), "j", "1"))
        return replace(group, rewards=tuple(rewards))


class RewriterOf:
    def __init__(self, reward) -> None:
        self.reward = reward

    async def rewrite_one(self, episode, ask):
        return self.reward


@pytest.fixture
def fencing_token(buffer):
    return buffer.attach("run", 0, capacity=100, max_attempts=2)


def worker(buffer, teacher, rewriter=None, metrics=None, **settings) -> Worker:
    config = WorkersConfig(**{"groups": 3, "lease": 30.0, "group_deadline": 20.0, "drain": 5.0} | settings)
    processor = GroupProcessor(AskingJudge(), rewriter)
    return Worker(buffer, teacher, lambda: processor, config, "worker-a", metrics or WorkerMetrics())


def run(one: Worker, until, timeout: float = 20.0, before=None) -> None:
    """Run the worker during ``before()`` and then until ``until()`` holds; stop it and wait for its end."""

    async def work():
        task = asyncio.create_task(one.run())
        if before is not None:
            await before()
        async with asyncio.timeout(timeout):
            while not until() and not task.done():
                await asyncio.sleep(0.01)
            one.stop()
            await task

    asyncio.run(work())


def test_groups_are_judged_and_handed_in_and_the_worker_leaves(buffer, fencing_token):
    buffer.put(fencing_token, items(*range(7)))
    teacher = ScriptedTeacher()
    run(worker(buffer, teacher), lambda: buffer.stats().finished == 7)
    taken = buffer.take(fencing_token, 0, 7)
    assert [one.episode.id for one in taken] == [f"episode-{number}" for number in range(7)]
    assert all([reward.value for reward in one.rewards] == [3.0, 3.0] for one in taken)
    assert len(teacher.asked) == 14
    assert buffer.announced("worker") == {}


class AskingRewriter:
    """Asks once, and takes the length of the answer as the rewrite's only token."""

    async def rewrite_one(self, episode, ask):
        reply = await ask(Request((Message("user", f"rewrite {episode.id}"),), seed=1, max_tokens=5))
        return reply if isinstance(reply, Failed) else Candidate(Source.REWRITE, (len(reply.text),))


def two_models(buffer, judge, rewriter) -> Worker:
    config = WorkersConfig(groups=3, lease=30.0, group_deadline=20.0, drain=5.0)
    processor = GroupProcessor(AskingJudge(), AskingRewriter())
    return Worker(buffer, judge, lambda: processor, config, "worker-a", WorkerMetrics(), rewriter)


def test_judge_and_rewriter_ask_their_own_models(buffer, fencing_token):
    buffer.put(fencing_token, items(0, 1))
    judge, rewriter = ScriptedTeacher(), ScriptedTeacher(lambda request: "rewritten")
    run(two_models(buffer, judge, rewriter), lambda: buffer.stats().finished == 2)
    assert [request.prompt[0].content.split()[0] for request in rewriter.asked] == ["rewrite", "rewrite"]
    assert not [request for request in judge.asked if "rewrite" in request.prompt[0].content]
    for one in buffer.take(fencing_token, 0, 2):
        rewrites = [reward for item, reward in one.rewarded() if item.source is Source.REWRITE]
        assert [reward.value for reward in rewrites] == [3.0], "the judge judged the rewrite"


def test_nothing_is_claimed_while_one_of_two_models_is_down(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    judge, rewriter = ScriptedTeacher(), ScriptedTeacher()
    rewriter.all_down, rewriter.trouble, rewriter.hopeless = True, "no server of the rewriter is known", True
    said: dict[str, str] = {}

    def told() -> bool:
        said.update(buffer.announced("worker"))
        return "trouble" in said.get("worker-a", "")

    run(two_models(buffer, judge, rewriter), told)
    known = json.loads(said["worker-a"])
    assert (known["trouble"], known["hopeless"]) == ("no server of the rewriter is known", True)
    assert buffer.stats().queued == 1
    assert not judge.asked


def test_no_more_groups_are_held_than_allowed(buffer, fencing_token):
    buffer.put(fencing_token, items(*range(9)))
    held = []

    async def slow(request):
        held.append(buffer.stats().leased)
        await asyncio.sleep(0.02)
        return "yes"

    run(worker(buffer, ScriptedTeacher(lambda request: slow(request))), lambda: buffer.stats().finished == 9)
    assert max(held) == 3


def test_it_says_that_it_is_there(buffer, fencing_token):
    metrics, seen = WorkerMetrics(), {}
    metrics.serve("127.0.0.1", 0)
    one = worker(buffer, ScriptedTeacher(), metrics=metrics)
    run(one, lambda: seen.update(buffer.announced("worker")) or seen)
    assert json.loads(seen["worker-a"])["metrics"] == metrics.address


def test_the_rewrite_stands_behind_the_original_and_its_failure_is_kept(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    rewrite = Candidate(Source.REWRITE, (70, 71), seed=3)
    run(worker(buffer, ScriptedTeacher(), RewriterOf(rewrite)), lambda: buffer.stats().finished == 1)
    (found,) = buffer.take(fencing_token, 0, 1)
    assert [candidate.source for candidate in found.candidates] == [Source.ORIGINAL, Source.REWRITE, Source.ROLLOUT]
    assert len(found.rewards) == 3
    buffer.put(fencing_token, items(1))
    run(
        worker(buffer, ScriptedTeacher(), RewriterOf(Failed("rewrite too short"))), lambda: buffer.stats().finished == 1
    )
    (found,) = buffer.take(fencing_token, 1, 1)
    assert len(found.candidates) == len(found.rewards) == 2
    assert found.rewrite_failure == Failed("rewrite too short")


def test_what_a_dead_worker_was_answered_is_not_asked_again(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    teacher = ScriptedTeacher()

    async def killed():
        task = asyncio.create_task(worker(buffer, teacher, lease=1.0).run())
        while len(teacher.asked) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def first_only(request):
        return "yes" if len(teacher.asked) == 1 else asyncio.sleep(60)

    teacher.answer = first_only
    asyncio.run(killed())
    assert buffer.stats().finished == 0
    other = ScriptedTeacher()
    run(worker(buffer, other), lambda: buffer.stats().finished == 1)
    assert [request_key("scripted", request) for request in other.asked] == [request_key("scripted", teacher.asked[1])]


def test_another_teachers_answers_do_not_count(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    key = request_key("another", Request((Message("user", "episode-0 0 (3, 4)"),), seed=0, max_tokens=5))
    buffer.remember(0, {key: json.dumps({"text": "no", "token_ids": [], "finish_reason": "stop", "prompt_tokens": 0})})
    teacher = ScriptedTeacher()
    run(worker(buffer, teacher), lambda: buffer.stats().finished == 1)
    assert len(teacher.asked) == 2


def test_a_group_that_is_judged_once_more_is_asked_about_with_other_seeds(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    teacher = ScriptedTeacher()
    run(worker(buffer, teacher), lambda: buffer.stats().finished == 1)
    buffer.retry(fencing_token, items(0))
    run(worker(buffer, teacher), lambda: buffer.stats().finished == 1)
    assert len({request.seed for request in teacher.asked}) == 4


def test_failures_of_servers_are_not_handed_in_and_the_last_attempt_makes_a_dead_letter(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    metrics = WorkerMetrics()
    run(worker(buffer, ScriptedTeacher(lambda request: Failed(REASON)), metrics=metrics), lambda: buffer.stats().dead)
    (letter,) = buffer.dead()
    assert (letter.reason, letter.attempts) == (REASON, 2)
    assert buffer.take(fencing_token, 0, 1)[0].rewards[0].reason == REASON
    assert metrics.registry.get_sample_value("rlpt_groups_given_back_total", {"reason": REASON}) == 2


def test_what_the_teacher_said_and_was_no_verdict_is_handed_in_as_failed(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    metrics = WorkerMetrics()
    teacher = ScriptedTeacher(lambda request: Failed("refused"))
    run(worker(buffer, teacher, metrics=metrics), lambda: buffer.stats().finished == 1)
    (found,) = buffer.take(fencing_token, 0, 1)
    assert [reward.reason for reward in found.rewards] == ["refused", "refused"]
    assert len(teacher.asked) == 2, "not asked again: it would say the same"
    assert metrics.registry.get_sample_value("rlpt_failed_judgments_total", {"reason": "refused"}) == 2


def test_nothing_is_claimed_while_no_server_answers(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    teacher = ScriptedTeacher()
    teacher.all_down = True

    async def come_up():
        await asyncio.sleep(1.2)
        assert buffer.stats().queued == 1
        teacher.all_down = False

    run(worker(buffer, teacher), lambda: buffer.stats().finished == 1, before=come_up)
    assert buffer.stats().finished == 1


def test_told_to_stop_it_finishes_what_it_holds_and_claims_nothing_more(buffer, fencing_token):
    buffer.put(fencing_token, items(*range(6)))
    teacher = ScriptedTeacher(lambda request: asyncio.sleep(0.1, "yes"))
    run(worker(buffer, teacher), lambda: len(teacher.asked) >= 1)
    stats = buffer.stats()
    assert (stats.finished, stats.queued, stats.leased) == (3, 3, 0)


def test_what_it_cannot_finish_in_time_goes_back_at_once_and_unharmed(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    teacher = ScriptedTeacher(lambda request: asyncio.sleep(60, "yes"))
    run(worker(buffer, teacher, drain=0.1), lambda: len(teacher.asked) >= 1)
    (work,) = buffer.claim("other", 1, 30.0, "lease")
    assert work.attempt == 1, "being stopped is not the group's fault"


def test_a_group_that_takes_too_long_is_given_back(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    teacher = ScriptedTeacher(lambda request: asyncio.sleep(60, "yes"))
    run(worker(buffer, teacher, group_deadline=0.1), lambda: buffer.stats().dead)
    assert buffer.dead()[0].reason == "group deadline exceeded"


def test_leases_are_renewed_while_a_group_is_judged(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    teacher = ScriptedTeacher(lambda request: asyncio.sleep(5.0, "yes"))
    run(worker(buffer, teacher, lease=3.0), lambda: buffer.stats().finished == 1)
    assert len(teacher.asked) == 2, "nobody else could claim it meanwhile"


def test_a_bug_in_judging_costs_one_group_and_not_the_worker(buffer, fencing_token):
    buffer.put(fencing_token, items(0, 1))

    def answer(request):
        if "episode-0" in request.prompt[0].content:
            raise KeyError("oops")
        return "yes"

    run(worker(buffer, ScriptedTeacher(answer)), lambda: buffer.stats().dead and buffer.stats().finished == 1)
    assert buffer.dead()[0].reason == "KeyError: 'oops'"
    assert buffer.take(fencing_token, 0, 2)[1] == judged_by_length(group(1))


def judged_by_length(one):
    return replace(one, rewards=(Reward(3.0, "j", "1"),) * 2)


def test_metrics_count_what_was_handed_in(buffer, fencing_token):
    buffer.put(fencing_token, items(0, 1))
    metrics = WorkerMetrics()
    run(worker(buffer, ScriptedTeacher(), metrics=metrics), lambda: buffer.stats().finished == 2)
    assert metrics.registry.get_sample_value("rlpt_groups_total") == 2
    assert metrics.registry.get_sample_value("rlpt_group_seconds_count") == 2
    assert metrics.registry.get_sample_value("rlpt_groups_in_flight") == 0


def test_what_was_claimed_while_it_was_told_to_stop_is_not_kept(buffer, fencing_token):
    buffer.put(fencing_token, items(0))
    claim, one = buffer.claim, worker(buffer, ScriptedTeacher())

    def slowly(*arguments):
        one._stopping._loop.call_soon_threadsafe(one.stop)  # while the store is being asked
        time.sleep(0.3)
        return claim(*arguments)

    async def work():
        one._stopping = asyncio.Event()
        one._stopping._loop = asyncio.get_running_loop()
        buffer.claim = slowly
        await one.run()

    asyncio.run(work())
    buffer.claim = claim
    stats = buffer.stats()
    assert (stats.leased, stats.queued + stats.finished) == (0, 1)


def test_a_worker_that_cannot_judge_ends_with_its_error_and_the_group_is_none_the_worse(buffer, fencing_token):
    buffer.put(fencing_token, items(0))

    def cannot():
        raise ModelError("no tokenizer")

    one = Worker(buffer, ScriptedTeacher(), cannot, WorkersConfig(groups=1), "w", WorkerMetrics())
    with pytest.raises(ModelError, match="no tokenizer"):
        asyncio.run(one.run())
    assert buffer.claim("other", 1, 30.0, "lease")[0].attempt == 1


def test_groups_that_are_only_rewritten_are_handed_in_without_outcomes(buffer, fencing_token):
    buffer.put(fencing_token, [(0, replace(group(0), candidates=()))])
    rewrite = Candidate(Source.REWRITE, (70, 71), seed=3)
    processor = GroupProcessor(None, RewriterOf(rewrite))
    one = Worker(buffer, ScriptedTeacher(), lambda: processor, WorkersConfig(groups=1), "w", WorkerMetrics())
    run(one, lambda: buffer.stats().finished == 1)
    assert buffer.take(fencing_token, 0, 1) == [replace(group(0), candidates=(rewrite,))]


def test_a_port_that_is_taken_is_one_line(buffer):
    first = WorkerMetrics()
    first.serve("127.0.0.1", 0)
    port = int(first.address.rsplit(":", 1)[1].split("/")[0])
    with pytest.raises(ConfigError, match=f"teacher.workers.metrics_port is {port}, which cannot be used"):
        WorkerMetrics().serve("127.0.0.1", port)


def test_metrics_listen_on_loopback_or_where_the_user_says(buffer):
    for host, named in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", socket.gethostname())):
        metrics = WorkerMetrics()
        metrics.serve(host, 0)
        assert metrics.address.startswith(f"http://{named}:")
    assert WorkersConfig().metrics_host == "127.0.0.1"
