"""Coroutines send single requests and get replies in batches."""

import asyncio

import pytest

from megatron_rlpt.teacher.batched import run_batched
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.types import Failed


class Echo:
    name = "echo"

    def __init__(self):
        self.batches = []

    def generate(self, requests):
        texts = [request.prompt[0].content for request in requests]
        self.batches.append(texts)
        return [Failed("no") if text.startswith("fail") else Reply(text.upper(), (), "stop") for text in texts]


def question(text):
    return Request((Message("user", text),), 1, 1)


def chain(name, length):
    """A job whose requests depend on earlier replies."""

    async def job(ask):
        answer = name
        for _ in range(length):
            answer = (await ask(question(answer + "."))).text
        return answer

    return job


def fan(name, width):
    """A job that sends several requests concurrently, in nested tasks, and one more about all replies."""

    async def one(ask, index):
        await asyncio.sleep(0)
        return (await ask(question(f"{name}{index}"))).text

    async def job(ask):
        answers = await gather_or_cancel(one(ask, index) for index in range(width))
        return (await ask(question("+".join(answers)))).text

    return job


def test_one_batch_per_round_however_deep_the_tasks():
    echo = Echo()
    results = run_batched([chain("a", 3), fan("b", 3), chain("c", 1)], echo)
    assert results == ["A...", "B0+B1+B2", "C."]
    assert [sorted(batch) for batch in echo.batches] == [["a.", "b0", "b1", "b2", "c."], ["A..", "B0+B1+B2"], ["A..."]]


def test_the_order_of_requests_is_the_same_every_time():
    runs = []
    for _ in range(5):
        echo = Echo()
        run_batched([fan(name, 5) for name in "abc"] + [chain("d", 2)], echo)
        runs.append(echo.batches)
    assert all(run == runs[0] for run in runs)


def test_nothing_to_do_asks_nothing():
    async def silent(ask):
        return 1

    echo = Echo()
    assert run_batched([], echo) == []
    assert run_batched([silent], echo) == [1]
    assert echo.batches == []


def test_a_failure_is_an_answer():
    async def job(ask):
        return await ask(question("fail"))

    assert run_batched([job], Echo()) == [Failed("no")]


def test_an_exception_in_one_job_surfaces_and_ends_the_others():
    ended = []

    async def broken(ask):
        await ask(question("x"))
        raise ZeroDivisionError("of this job")

    async def patient(ask):
        try:
            while True:
                await ask(question("y"))
        finally:
            ended.append(True)

    with pytest.raises(ZeroDivisionError, match="of this job"):
        run_batched([patient, broken, patient], Echo())
    assert ended == [True, True]


def test_an_exception_of_the_generator_surfaces_and_ends_all_jobs():
    ended = []

    class Dead:
        name = "dead"

        def generate(self, requests):
            raise OSError("the engine is gone")

    async def job(ask):
        try:
            await ask(question("x"))
        finally:
            ended.append(True)

    with pytest.raises(OSError, match="the engine is gone"):
        run_batched([job, job], Dead())
    assert ended == [True, True]


def test_a_job_that_waits_for_something_else_is_an_error_and_no_hang():
    async def job(ask):
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="waits for something other"):
        run_batched([job], Echo())
