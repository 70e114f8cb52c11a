"""Ask a run's teacher servers from outside of it: find them, judge groups, or get texts, without worker or trainer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import (
    Config,
    EndpointConfig,
    Role,
    RunIn,
    TeacherUse,
    judge_facts,
    model_of,
    rewriter_has_own_model,
)
from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.judge_workers.client.pool import TeacherPool
from megatron_rlpt.judge_workers.discovery import KIND, servers_of
from megatron_rlpt.models.adapters import special_tokens_of
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Reply, Request
from megatron_rlpt.teacher.judge import GroupJudge
from megatron_rlpt.teacher.judges import ServedTeacher, builder_of
from megatron_rlpt.types import Failed, Group

_PATIENCE = 5.0
"""Longest seconds to retry while the buffer cannot be reached, because a user is waiting."""
_AT_ONCE = 64
"""Groups under way; their requests queue for the servers."""

MakeJudge = Callable[[ServedTeacher], GroupJudge]


def teacher_servers(config: Config) -> tuple[list[EndpointConfig], str]:
    """Return the servers that the judge of ``config`` asks, and why there are none where some were expected.

    Those are the configured ones, else those announced in the rollout buffer. A judge that asks nothing, and one whose
    model its own process loads, has none.
    """
    workers = config.teacher.workers
    if judge_facts(config).asks is TeacherUse.nothing:
        return [], ""
    if workers.endpoints or workers.own_model or config.teacher.run_in is not RunIn.workers:
        return workers.endpoints, ""
    settings = replace(config.buffer, retry=min(config.buffer.retry, _PATIENCE))
    try:
        with contextlib.closing(open_buffer(replace(config, buffer=settings), create=False)) as buffer:
            found = servers_of(config, model_of(config, Role.judge).asked_for((Role.judge,)), buffer.announced(KIND))
    except BufferUnavailableError as error:
        return [], str(error)
    whose = " for the judge" if rewriter_has_own_model(config) else ""
    return found, "" if found else f"none is announced{whose} in the rollout buffer"


def judge_on_servers(
    config: Config,
    groups: Sequence[Group],
    endpoints: Sequence[EndpointConfig],
    make: MakeJudge | None = None,
    done: Callable[[int, Group], None] | None = None,
) -> list[Group]:
    """Judge ``groups`` by asking servers; return them in order.

    Args:
        config: of the judge.
        groups: what to judge.
        endpoints: servers, of which at least one has to answer within ``teacher.workers.request_deadline``.
        make: builds the judge for the servers; by default the judge of ``config``.
        done: called with position and judged group as soon as each is judged.

    Raises:
        TeacherError: no server answers.
        ModelError: the servers' model has another vocabulary than a judge by likelihood needs.
    """
    if make is None:
        builder_of(config).check_servers(config)
    return asyncio.run(_judge(config, groups, endpoints, make, done))


def ask_on_servers(
    config: Config,
    requests: Sequence[Request],
    endpoints: Sequence[EndpointConfig],
    done: Callable[[int, Reply | Failed], None],
) -> None:
    """Send ``requests`` to servers.

    Args:
        config: of the teacher: time for an answer, folder with its special tokens.
        requests: what to ask.
        endpoints: servers, of which at least one has to answer within ``teacher.workers.request_deadline``.
        done: called with position and reply or failure as soon as each is there.

    Raises:
        TeacherError: no server answers.
    """
    asyncio.run(_send(config, requests, endpoints, done))


async def _send(
    config: Config,
    requests: Sequence[Request],
    endpoints: Sequence[EndpointConfig],
    done: Callable[[int, Reply | Failed], None],
) -> None:
    deadline = config.teacher.workers.request_deadline
    async with TeacherPool(endpoints, deadline, special_tokens_of(config.teacher_path)) as pool:
        await pool.wait_until_ready(deadline)
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(index: int, request: Request) -> None:
            async with room:
                reply = await pool(request)
            done(index, reply)

        await gather_or_cancel(one(index, request) for index, request in enumerate(requests))


async def _judge(
    config: Config,
    groups: Sequence[Group],
    endpoints: Sequence[EndpointConfig],
    make: MakeJudge | None,
    done: Callable[[int, Group], None] | None,
) -> list[Group]:
    deadline = config.teacher.workers.request_deadline
    known = special_tokens_of(config.teacher_path)
    async with TeacherPool(endpoints, deadline, known) as pool:
        await pool.wait_until_ready(deadline)
        judge = make(pool) if make else builder_of(config).for_servers(config, pool)
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(index: int, group: Group) -> Group:
            async with room:
                judged = await judge.judge_group(group, pool)
            if done:
                done(index, judged)
            return judged

        return await gather_or_cancel(one(index, group) for index, group in enumerate(groups))
