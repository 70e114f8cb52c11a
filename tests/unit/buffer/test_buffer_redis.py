"""The Redis server of a rollout buffer: requirements, lost connections, passwords, TLS."""

import contextlib
import logging
import os
import socket
import subprocess
import threading

import pytest
import redis
from buffer_groups import group, items, judged
from redis_server import RedisServer

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.buffer.redis_store import RedisBuffer
from megatron_rlpt.config.buffer_address import RedisAddress, parse_url
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.trainer.buffered_judging import BufferedJudging
from megatron_rlpt.trainer.returned_groups import Expected

pytestmark = pytest.mark.redis

LONG = 600.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server for this module only, to misconfigure and kill."""
    with RedisServer(tmp_path_factory.mktemp("redis") / "own") as server:
        yield server


@pytest.fixture
def admin(server):
    """A client of Redis whose settings are reverted after the test."""
    with redis.Redis.from_url(server.url, password=server.password, decode_responses=True) as client:
        changed = {}

        def configure(**values):
            for name, value in values.items():
                name = name.replace("_", "-")
                changed.setdefault(name, client.config_get(name)[name])
                client.config_set(name, value)

        client.configure = configure
        yield client
        for name, value in changed.items():
            client.config_set(name, value)


def buffer_of(server, name="demo", **options):
    return open_url(name=name, **{**server.options, "retry": 20.0, **options})


def attached(buffer):
    return buffer.attach("run", 0, capacity=100, max_attempts=3, replace=True)


def refusal(call, server):
    with pytest.raises(BufferUnavailableError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert server.password not in said
    return said


def test_a_server_that_drops_keys_is_refused(server, admin):
    for policy in ("allkeys-lru", "volatile-ttl"):
        admin.configure(maxmemory_policy=policy)
        said = refusal(lambda: buffer_of(server), server)
        assert said.startswith(server.url)
        assert f"maxmemory-policy {policy}" in said
        assert "CONFIG SET maxmemory-policy noeviction" in said


def test_a_server_that_is_too_old_is_refused(server, monkeypatch):
    info = redis.Redis.info
    monkeypatch.setattr(redis.Redis, "info", lambda self: {**info(self), "redis_version": "6.2.14"})
    assert "is Redis 6.2.14; the rollout buffer needs 7 or newer" in refusal(lambda: buffer_of(server), server)


def test_without_an_append_only_file_there_is_a_warning(server, admin, caplog):
    logging.getLogger("megatron_rlpt").propagate = True
    buffer_of(server).close()
    assert caplog.text == ""
    admin.configure(appendonly="no")
    buffer_of(server).close()
    assert "keeps no append-only file" in caplog.text


def test_another_format_is_refused(server, admin):
    buffer_of(server, "old").close()
    admin.hset("rlpt:{old}", "format", 7)
    assert "has format 7, this version uses 1" in refusal(lambda: buffer_of(server, "old"), server)


def test_a_buffer_that_has_to_be_there_is_not_made(server, admin):
    said = refusal(lambda: buffer_of(server, "nobody", create=False), server)
    assert "has no rollout buffer 'nobody'" in said
    assert admin.keys("*nobody*") == []


def test_nothing_is_left_of_groups_that_are_acknowledged(server, admin):
    admin.flushdb()
    buffer = buffer_of(server, "clean")
    fencing_token = attached(buffer)
    empty = set(admin.keys())
    buffer.put(fencing_token, items(0, 1, 2, 3))
    first, second, third, _ = buffer.claim("w", 4, LONG, "lease")
    buffer.remember(0, {"key": "answer"})
    buffer.complete(first, judged(group(0)))
    buffer.give_back(second)
    buffer.renew([third], LONG)
    buffer.acknowledge(fencing_token, 4)
    assert set(admin.keys()) == empty
    assert empty == {"rlpt:{clean}"}


# Passwords.


def test_wrong_and_missing_passwords(server, monkeypatch, tmp_path):
    monkeypatch.delenv("RLPT_BUFFER_PASSWORD", raising=False)
    said = refusal(lambda: open_url(server.url, "demo", retry=LONG), server)
    assert "refuses the password" in said
    monkeypatch.setenv("RLPT_BUFFER_PASSWORD", "hush-hush")
    said = refusal(lambda: open_url(server.url, "demo", retry=LONG), server)
    assert "set RLPT_BUFFER_PASSWORD or buffer.password_file to the right one" in said
    assert "hush-hush" not in said
    monkeypatch.setenv("RLPT_BUFFER_PASSWORD", server.password)
    open_url(server.url, "demo").close()


def test_the_password_is_not_shown(server):
    buffer = buffer_of(server)
    assert server.password not in repr(buffer) + repr(vars(buffer)) + repr(buffer._connection)
    assert repr(buffer) == f"RedisBuffer('{server.url}', 'demo')"


# Losing the connection.


def test_a_server_that_cannot_be_reached(server):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    said = refusal(lambda: buffer_of(server, url=f"redis://127.0.0.1:{port}", retry=0.3), server)
    assert said.startswith(f"redis://127.0.0.1:{port}/0 could not be reached or used for 0.3 s (")
    assert said.endswith("start it, or raise buffer.retry")


def test_a_killed_server_is_waited_for_and_has_everything_when_it_is_back(server):
    buffer = buffer_of(server, "killed", retry=60.0)
    fencing_token = attached(buffer)
    buffer.put(fencing_token, items(0, 1, 2))
    (work,) = buffer.claim("w", 1, LONG, "lease")
    buffer.complete(work, judged(group(0)))
    server.kill()
    starting = threading.Timer(0.3, server.start)
    starting.start()
    try:
        assert buffer.take(fencing_token, 0, 1) == [judged(group(0))]
    finally:
        starting.join()
    assert [entry.state for entry in buffer.entries()] == ["taken", "queued", "queued"]


def test_a_server_that_is_out_of_memory_still_lets_go_of_groups(server, admin):
    buffer = buffer_of(server, "full", retry=0.2)
    fencing_token = attached(buffer)
    buffer.put(fencing_token, items(0))
    admin.configure(maxmemory="1")
    said = refusal(lambda: buffer.put(fencing_token, items(1)), server)
    assert "has been out of memory for 0.2 s; raise its maxmemory" in said
    buffer.acknowledge(fencing_token, 1)
    admin.configure(maxmemory="0")
    assert list(buffer.entries()) == []
    assert buffer.stats().acknowledged == 1


def test_a_user_who_may_not_do_everything(server, admin, tmp_path):
    admin.acl_setuser(
        "reader", enabled=True, passwords=["+pass"], keys=["*"], commands=["+@read", "+info", "+@connection"]
    )
    password = tmp_path / "password"
    password.write_text("pass")
    password.chmod(0o600)
    url = server.url.replace("//", "//reader@")
    try:
        said = refusal(lambda: buffer_of(server, url=url, password_file=str(password), retry=LONG), server)
        assert said.startswith(f"{url} denies this user an operation of the buffer (")
    finally:
        admin.acl_deluser("reader")


class Proxy:
    """A proxy between client and server; if ``lose_next`` is set, it drops the next answer and the connection."""

    def __init__(self, port: int) -> None:
        self.lose_next = self.lost = False
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._pass_on, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self.lose_next:
                    self.lose_next, self.lost = False, True
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def proxy(server):
    proxy = Proxy(parse_url(server.url).port)
    yield proxy
    proxy.close()


def test_an_operation_whose_answer_was_lost_is_answered_as_if_it_were_not(server, proxy):
    buffer = RedisBuffer(RedisAddress("127.0.0.1", proxy.port), "lost", password=server.password, retry=20.0)

    def losing(call):
        proxy.lose_next, proxy.lost = True, False
        answer = call()
        assert proxy.lost
        return answer

    fencing_token = losing(lambda: attached(buffer))
    assert losing(lambda: buffer.put(fencing_token, items(0, 1))) == 2
    works = losing(lambda: buffer.claim("w", 1, LONG, "lease"))
    assert [(work.sequence, work.attempt) for work in works] == [(0, 1)]
    assert losing(lambda: buffer.renew(works, LONG)) == works
    assert losing(lambda: buffer.complete(works[0], judged(group(0)))) is True
    assert buffer.complete(works[0], judged(group(0))) is False
    (work,) = buffer.claim("w", 1, LONG, "lease 2")
    losing(lambda: buffer.give_back(work, "no"))
    assert buffer.claim("w", 1, LONG, "lease 3")[0].attempt == 2
    assert losing(lambda: buffer.take(fencing_token, 0, 1)) == [judged(group(0))]
    losing(lambda: buffer.retry(fencing_token, items(0)))
    losing(lambda: buffer.acknowledge(fencing_token, 1))
    assert [entry.sequence for entry in buffer.entries()] == [1]


def test_a_run_that_is_to_stop_keeps_what_it_cannot_send_and_waits_for_no_server(tmp_path):
    stop = threading.Event()
    with RedisServer(tmp_path / "gone") as server:
        buffer = buffer_of(server, retry=LONG, stopping=stop.is_set)
        through = BufferedJudging(
            buffer,
            Ranks(),
            run="run",
            replace=False,
            capacity=4,
            max_attempts=3,
            settings="{}",
            expected=Expected(suffix_length=2, vocab=100),
            max_failure_rate=0.5,
            max_pause=0.0,
            stopping=stop.is_set,
        )
        through.start(0, {})
        through.submit(0, [group(0)])
        server.kill()
        sending = threading.Thread(target=lambda: through.submit(1, [group(1)]))
        sending.start()
        stop.set()
        sending.join(60)
        assert not sending.is_alive()
        assert through.collect(0, 2, 0) is None, "the run may stop"
        assert through.pending() == {0: group(0), 1: group(1)}, "and its checkpoint has all of them"
        with pytest.raises(BufferUnavailableError, match="and this process is stopping"):
            buffer.stats()
        through.close()


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=sandbox"
        " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem",
        shell=True,
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


def test_tls(server, admin, certificate, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {
        "tls-auth-clients": "no",
        "tls-cert-file": certificate / "cert.pem",
        "tls-key-file": certificate / "key.pem",
        "tls-ca-cert-file": certificate / "cert.pem",
        "tls-port": port,
    }.items():
        admin.config_set(name, str(value))
    url = f"rediss://127.0.0.1:{port}/0"
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    said = refusal(lambda: buffer_of(server, url=url, retry=LONG), server)
    assert "has a certificate that is not trusted" in said
    assert "SSL_CERT_FILE" in said
    monkeypatch.setitem(os.environ, "SSL_CERT_FILE", str(certificate / "cert.pem"))
    buffer = buffer_of(server, "tls", url=url)
    buffer.put(attached(buffer), items(0))
    assert [entry.group for entry in buffer_of(server, "tls").entries()] == [group(0)]
    # The wrong port: plain text to a TLS port, and TLS to a plain one.
    said = refusal(lambda: buffer_of(server, url=url.replace("rediss", "redis"), retry=0.2), server)
    assert "could not be reached or used" in said
    refusal(lambda: buffer_of(server, url=server.url.replace("redis:", "rediss:"), retry=0.2), server)
