"""``rlpt judge serve``: build one worker from its configuration and run it until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from megatron_rlpt.backoff import Backoff
from megatron_rlpt.buffer.open import location_of, open_buffer
from megatron_rlpt.buffer.protocol import RolloutBuffer
from megatron_rlpt.config import Config, Role, RoleModel, RunIn, longest_answer, models_asked, needs_judge
from megatron_rlpt.config.rewriters import rewrites_by_asking
from megatron_rlpt.errors import BufferUnavailableError, ConfigError
from megatron_rlpt.judge_workers.client.pool import TeacherPool
from megatron_rlpt.judge_workers.discovery import KIND, server_key, servers_of
from megatron_rlpt.judge_workers.group_processor import GroupProcessor
from megatron_rlpt.judge_workers.metrics import WorkerMetrics
from megatron_rlpt.judge_workers.role_servers import open_pool, require_two_models
from megatron_rlpt.judge_workers.worker import TeacherClient, Worker
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.teacher.build import build_rewriter
from megatron_rlpt.teacher.judge import GroupJudge
from megatron_rlpt.teacher.judges import LocalJudge, builder_of, local_judge, needs_no_server
from megatron_rlpt.teacher.rewriter import answer_tokens
from megatron_rlpt.teacher.settings_fingerprint import SETTINGS, require_same_settings

_log = get_logger(__name__)

_POLL = 3.0
"""Seconds between two reads of announcements."""
_REMINDERS = Backoff(30.0, 3600.0)
"""Intervals between reminders of what a worker waits for."""
_WHERE_TRAINER = (
    "is rlpt train running, with the same buffer.url, buffer.name and run.dir, and with teacher.run_in=workers? SQLite "
    "is for one machine"
)
_READY = 600.0
"""Maximum seconds to wait for the first server; large models take minutes to load."""


def most_tokens(config: Config, roles: tuple[Role, ...]) -> int:
    """Return the longest answer that a worker requests of a model with these ``roles``, in tokens; 0 for none."""
    judge = longest_answer(config) if Role.judge in roles and needs_judge(config) else 0
    return max(judge, answer_tokens(config) if Role.rewriter in roles and rewrites_by_asking(config) else 0)


def run_worker(config: Config, name: str = "") -> None:
    """Judge until SIGTERM or Ctrl-C.

    Args:
        config: the run's configuration.
        name: name of this worker; by default made of host, process id and a random part.

    Raises:
        RlptError: configuration, buffer or servers are unusable.
    """
    if config.teacher.run_in is not RunIn.workers:
        raise ConfigError("teacher.run_in is trainer; allowed: workers, for a run whose groups workers judge")
    name = name or f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    asyncio.run(_run(resolve_dtypes(config), name))


async def _run(config: Config, name: str) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    buffer = await asyncio.to_thread(open_buffer, config)
    try:
        async with contextlib.AsyncExitStack() as stack:
            own = asyncio.create_task(_local_judge(config))  # loads while the trainer starts
            await _until(stopped, asyncio.gather(_wait_for_trainer(config, buffer), own))
            if stopped.is_set():
                return
            teachers, processor, metrics = await stack.enter_async_context(
                _teachers(config, buffer, stopped, own.result())
            )
            if stopped.is_set():
                return
            metrics.serve(config.teacher.workers.metrics_host, config.teacher.workers.metrics_port)
            judging, rewriting = teachers
            worker = Worker(buffer, judging, processor, config.teacher.workers, name, metrics, rewriting)
            names = "+".join(dict.fromkeys((judging.name, rewriting.name)))
            _log.info("judging", worker=name, teacher=names, metrics=metrics.address or "off")
            working = asyncio.create_task(worker.run())
            watching = asyncio.create_task(_watch_trainer(config, buffer))
            stopping = asyncio.create_task(_stop_when(stopped, worker))
            try:
                await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
                worker.stop()
                await working
                if watching.done():
                    watching.result()
            finally:
                for task in (working, watching, stopping):
                    task.cancel()
                await asyncio.gather(working, watching, stopping, return_exceptions=True)
    finally:
        await asyncio.to_thread(buffer.close)


async def _watch_trainer(config: Config, buffer: RolloutBuffer) -> None:
    """Raise if a restarted trainer announces other settings."""
    while True:
        await asyncio.sleep(_POLL)
        for announced in (await asyncio.to_thread(buffer.announced, SETTINGS)).values():
            require_same_settings(config, announced)


async def _stop_when(stopped: asyncio.Event, worker: Worker) -> None:
    await stopped.wait()
    worker.stop()


async def _until(stopped: asyncio.Event, work: Awaitable[object]) -> None:
    """Await ``work`` unless a stop request comes first."""
    tasks: list[asyncio.Future[object]] = [asyncio.ensure_future(work), asyncio.create_task(stopped.wait())]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for task in done:
        task.result()


async def _wait_for_trainer(config: Config, buffer: RolloutBuffer) -> None:
    url, name = location_of(config)
    began, remind_at, reminders = time.monotonic(), 0.0, 1
    while not (announced := await asyncio.to_thread(buffer.announced, SETTINGS)):
        waited = time.monotonic() - began
        if not remind_at:
            _log.info("waiting for the trainer to open the rollout buffer", buffer=url, run=name)
            remind_at = _REMINDERS.delay(reminders)
        elif waited >= remind_at:
            _log.warning(
                "still waiting for the trainer to open the rollout buffer",
                buffer=url,
                run=name,
                waited=f"{waited:.0f} s",
                check=_WHERE_TRAINER,
            )
            reminders += 1
            remind_at = waited + _REMINDERS.delay(reminders)
        await asyncio.sleep(_POLL / 3)
    require_same_settings(config, next(iter(announced.values())))


async def _local_judge(config: Config) -> LocalJudge | None:
    return await asyncio.to_thread(local_judge, config) if needs_no_server(config) else None


@contextlib.asynccontextmanager
async def _teachers(
    config: Config, buffer: RolloutBuffer, stopped: asyncio.Event, own: LocalJudge | None
) -> AsyncIterator[tuple[tuple[TeacherClient, TeacherClient], Callable[[], GroupProcessor], WorkerMetrics]]:
    """Yield the clients of judge and rewriter, the processor factory and the metrics of a worker."""
    if own:
        rewriter = await asyncio.to_thread(build_rewriter, config) if config.candidates.rewrite else None
        yield (own, own), lambda: GroupProcessor(own if needs_judge(config) else None, rewriter), WorkerMetrics()
        return
    if needs_judge(config):
        await asyncio.to_thread(builder_of(config).check_servers, config)
    server_key(config.teacher.workers.key_env)  # fail now, not at the first announced server, if the key is missing
    announced = await asyncio.to_thread(buffer.announced, KIND)
    async with contextlib.AsyncExitStack() as stack:
        pools = {
            model: await stack.enter_async_context(open_pool(config, model, announced))
            for model in models_asked(config)
        }
        updating = asyncio.create_task(_update_servers(config, buffer, pools))
        try:
            await _until(stopped, asyncio.gather(*(pool.wait_until_ready(_READY) for pool in pools.values())))
            if not stopped.is_set():
                require_two_models(config, pools)
                await _until(stopped, _check_deadlines(config, pools))
            judging, rewriting = (_with_role(pools, role) for role in Role)
            processor = await asyncio.to_thread(_processor_factory, config, judging)
            if not stopped.is_set():
                processor()  # raise before the first claim if anything cannot be loaded
            servers = list(pools.values())
            yield (
                (judging, rewriting),
                processor,
                WorkerMetrics(lambda: [one for pool in servers for one in pool.endpoints]),
            )
        finally:
            updating.cancel()
            await asyncio.gather(updating, return_exceptions=True)


async def _check_deadlines(config: Config, pools: Mapping[RoleModel, TeacherPool]) -> None:
    for model, pool in pools.items():
        if longest := most_tokens(config, model.roles):
            await pool.check_deadline(longest)


def _with_role(pools: Mapping[RoleModel, TeacherPool], role: Role) -> TeacherPool:
    """Return the pool of the model with ``role``; of a role that is not asked, the other's."""
    return next((pool for model, pool in pools.items() if model.has(role)), next(iter(pools.values())))


def judge_of(config: Config, pool: TeacherPool) -> GroupJudge:
    """Build the judge that uses ``pool``, of which at least one server has answered."""
    return builder_of(config).for_servers(config, pool)


def _processor_factory(config: Config, pool: TeacherPool) -> Callable[[], GroupProcessor]:
    rewriter = build_rewriter(config) if config.candidates.rewrite else None
    judged = needs_judge(config)

    @functools.lru_cache(maxsize=1)
    def processor(teacher: str) -> GroupProcessor:
        # Servers with another model may join: rewards carry the names of all models in use.
        return GroupProcessor(judge_of(config, pool) if judged else None, rewriter)

    return lambda: processor(pool.name)


async def _update_servers(config: Config, buffer: RolloutBuffer, pools: Mapping[RoleModel, TeacherPool]) -> None:
    """Keep the pools in step with announcements; requeued server jobs come back on other machines."""
    while True:
        await asyncio.sleep(_POLL)
        try:
            announced = await asyncio.to_thread(buffer.announced, KIND)
        except BufferUnavailableError as error:
            _log.warning("cannot read announcements of teacher servers", reason=error)
            continue
        for model, pool in pools.items():
            pool.update(servers_of(config, model, announced))
