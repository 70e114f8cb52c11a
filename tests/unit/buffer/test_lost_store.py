"""A store that returns empty or in an older state: the trainer puts missing groups again, and trains on none twice.

Real Redis, killed and started on an older copy of its files; SQLite files that are removed or replaced.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import threading

import pytest
from buffer_groups import group, judged
from redis_server import RedisServer

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.buffer.protocol import RolloutBuffer
from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import BufferConflictError
from megatron_rlpt.teacher.settings_fingerprint import SETTINGS
from megatron_rlpt.trainer import buffer_attachment as attachment
from megatron_rlpt.trainer.buffered_judging import BufferedJudging
from megatron_rlpt.trainer.returned_groups import Expected

BATCH = 4


class Redis:
    """A server that can lose its latest writes, or everything."""

    def __init__(self, folder, stack):
        self._server = stack.enter_context(RedisServer(folder / "server"))
        self._copy = folder / "copy"
        self.options = {**self._server.options, "name": "run"}

    def remember(self):
        # Kill it first: a copy of a growing file may have a state that never existed.
        self._server.kill()
        shutil.copytree(self._server.folder / "data", self._copy)
        self._server.start()

    def come_back_older(self):
        self._server.kill()
        shutil.rmtree(self._server.folder / "data")
        shutil.copytree(self._copy, self._server.folder / "data")
        self._server.start()

    def come_back_empty(self):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        host, port = self._server.url.removeprefix("redis://").split("/")[0].split(":")
        # Once: on a busy machine the client would time out and empty the server again later.
        patient = {"socket_timeout": 60.0, "retry": Retry(NoBackoff(), 0)}
        redis.Redis(host, int(port), password=self._server.password, **patient).flushall()


class Sqlite:
    """A file that is removed, or restored from a copy."""

    def __init__(self, folder, stack):
        self._path, self._copy = folder / "buffer.sqlite", folder / "copy.sqlite"
        self.options = {"url": f"sqlite:///{self._path}", "name": "run"}

    def remember(self):
        import sqlite3

        with contextlib.closing(sqlite3.connect(self._path)) as source:
            source.execute("VACUUM INTO ?", (str(self._copy),))

    def come_back_older(self):
        self.come_back_empty()
        self._copy.rename(self._path)

    def come_back_empty(self):
        for path in self._path.parent.glob("buffer.sqlite*"):
            path.unlink()


@pytest.fixture(params=[pytest.param(Redis, marks=pytest.mark.redis), Sqlite])
def store(request, tmp_path):
    with contextlib.ExitStack() as stack:
        yield request.param(tmp_path, stack)


@pytest.fixture
def opened(store):
    handles = []

    def open_again():
        handles.append(open_url(**store.options, retry=20.0))
        return handles[-1]

    yield open_again
    for handle in handles:
        handle.close()


def trainer(buffer) -> BufferedJudging:
    return BufferedJudging(
        buffer,
        Ranks(),
        run="run",
        replace=False,
        capacity=3 * BATCH,
        max_attempts=5,
        settings=json.dumps({"seed": 1}),
        expected=Expected(suffix_length=2, vocab=10**6),
        max_failure_rate=0.9,
        max_pause=0.0,
    )


def submit(judging, step):
    judging.submit(step * BATCH, [group(step * BATCH + place) for place in range(BATCH)])


def collect(judging, step):
    found = None
    while found is None:
        found = judging.collect(step * BATCH, BATCH, step)
    return [one.rewards[0].value for one in found]


_leases = itertools.count()


def work_off(buffer: RolloutBuffer):
    works = buffer.claim("w", 100, 60.0, f"lease-{next(_leases)}")
    for work in works:
        buffer.complete(work, judged(work.group, float(work.sequence)))
    return [work.sequence for work in works]


def expected(step):
    return [float(step * BATCH + place) for place in range(BATCH)]


@pytest.mark.parametrize("how", ["come_back_older", "come_back_empty"])
def test_the_trainer_puts_back_what_is_missing_and_goes_on(store, opened, how, caplog):
    judging, worker = trainer(opened()), opened()
    judging.start(0, {})
    submit(judging, 0)
    worker.announce("worker", "w", "{}", 60.0)
    store.remember()
    for step in (1, 2):
        submit(judging, step)
    work_off(worker)
    assert collect(judging, 0) == expected(0)
    judging.acknowledge(BATCH)
    assert collect(judging, 1) == expected(1)
    # All groups of the copy have been trained on; it holds none of those that are waiting.
    getattr(store, how)()
    with caplog.at_level(logging.WARNING):
        submit(judging, 3)
    assert work_off(worker) == list(range(2 * BATCH, 4 * BATCH)), "what was learnt from is judged again"
    assert [collect(judging, step) for step in (2, 3)] == [expected(2), expected(3)]
    assert worker.announced(SETTINGS) == {"trainer": '{"seed": 1}'}
    told = [record for record in caplog.records if "came back older" in record.message]
    assert len(told) == 1, [record.fields for record in told]
    assert (told[0].fields["lost"], told[0].fields["groups"]) == (BATCH, BATCH)
    judging.acknowledge(4 * BATCH)
    assert (worker.stats().acknowledged, worker.stats().queued) == (4 * BATCH, 0)
    judging.close()


def test_lost_after_it_was_judged_it_is_judged_again(store, opened):
    """While the trainer waits, in the middle of a poll: no action of a user is needed."""
    judging, worker = trainer(opened()), opened()
    judging.start(0, {})
    store.remember()
    submit(judging, 0)
    work_off(worker)
    store.come_back_older()
    over = threading.Event()

    def work():
        while not over.wait(0.05):
            work_off(worker)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert collect(judging, 0) == expected(0)
    finally:
        over.set()
        thread.join()
        judging.close()


def test_a_store_that_lost_the_place_it_was_at_does_not_count_itself_full(store, opened):
    judging, worker = trainer(opened()), opened()
    judging.start(0, {})
    store.remember()
    for step in range(6):
        submit(judging, step)
        work_off(worker)
        assert collect(judging, step) == expected(step)
    store.come_back_older()
    for step in (6, 7):
        submit(judging, step)
    work_off(worker)
    assert [collect(judging, step) for step in (6, 7)] == [expected(6), expected(7)]
    judging.close()


def test_another_trainer_that_came_first_afterwards_keeps_it(store, opened):
    judging = trainer(opened())
    judging.start(0, {})
    store.come_back_empty()
    other = opened()
    other.attach("another run", 0, capacity=4, max_attempts=1)
    other.put(other.attach("another run", 0, capacity=4, max_attempts=1), [(0, group(0))])
    with pytest.raises(BufferConflictError, match="another trainer has attached"):
        submit(judging, 0)
    judging.close()
    assert other.stats().queued == 1


def test_a_trainer_that_goes_on_with_other_episodes_drops_what_the_store_kept(store, opened):
    first = trainer(opened())
    first.start(0, {})
    submit(first, 0)
    submit(first, 1)
    work_off(opened())
    first.close()
    second = trainer(opened())
    second.start(0, {0: group(0)}, discard=True)
    worker = opened()
    assert work_off(worker) == [0], "what is put again, and nothing that was there"
    second.submit(1, [group(100 + place) for place in range(BATCH - 1)])
    work_off(worker)
    assert len(collect(second, 0)) == BATCH
    second.close()


def test_a_renewal_under_way_is_no_error_when_the_buffer_is_let_go_of(tmp_path, monkeypatch):
    """Its connection is closed meanwhile, and every client reports that with a different error."""
    monkeypatch.setattr(attachment, "RENEW", 0.01)
    monkeypatch.setattr(attachment, "_LEAVE", 0.1)
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    under_way, closed, over = threading.Event(), threading.Event(), threading.Event()
    with contextlib.closing(open_url(f"sqlite:///{tmp_path}/buffer.sqlite", "run")) as buffer:
        hold = buffer.hold

        def cut_off(fencing_token: int, holder: str, seconds: float) -> None:
            if threading.current_thread() is threading.main_thread():
                return hold(fencing_token, holder, seconds)
            under_way.set()
            closed.wait(30)
            over.set()
            raise AttributeError("'NoneType' object has no attribute 'recv'")

        monkeypatch.setattr(buffer, "hold", cut_off)
        held = attachment.Attachment(
            buffer,
            run="run",
            replace=False,
            capacity=1,
            max_attempts=1,
            settings="",
            put_back=lambda fencing_token: 0,
            cursor=lambda: 0,
            holder=Holder.me(),
        )
        held.open()
        assert under_way.wait(30)
        held.close()
        closed.set()
        assert over.wait(30)
    for thread in threading.enumerate():
        if thread.name == "attachment":
            thread.join(30)
    assert not raised
