"""The Redis sandbox: its data survives, bad folders are refused, and other processes are unharmed."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest
import redis
from redis_server import SCRIPT, RedisServer
from sandbox_script import call

pytestmark = pytest.mark.redis

sandbox = partial(call, SCRIPT)


@pytest.fixture
def server(tmp_path):
    with RedisServer(tmp_path / "server") as server:
        yield server


def client_of(server: RedisServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, password=server.password, decode_responses=True)


def test_it_is_as_a_rollout_buffer_wants_it(server):
    info = client_of(server).info()
    assert (info["aof_enabled"], info["maxmemory_policy"]) == (1, "noeviction")
    assert client_of(server).config_get("bind") == {"bind": "127.0.0.1"}


def test_only_its_owner_gets_in(server):
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(server.url).ping()
    for name, mode in ((".", 0o700), ("password", 0o600), ("redis.conf", 0o600)):
        assert stat.S_IMODE((server.folder / name).stat().st_mode) == mode


def test_what_it_holds_survives_stop_and_kill_at_the_same_address(server):
    client_of(server).set("a", "1")
    before = server.url
    server.stop()
    server.start()
    client_of(server).set("b", "2")
    server.kill()
    server.start()
    assert server.url == before
    assert client_of(server).mget("a", "b") == ["1", "2"]


def test_stop_ends_its_own_process_and_no_other(server):
    ((number, _),) = json.loads((server.folder / "processes.json").read_text()).values()
    code, _, err = sandbox("start", server.folder)
    assert (code, err.startswith(f"error: {server.folder} is running already")) == (1, True)
    assert sandbox("stop", server.folder) == (0, "", "")
    assert not Path(f"/proc/{number}").exists() or "Z" in Path(f"/proc/{number}/stat").read_text()
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            (server.folder / "processes.json").write_text(json.dumps({"redis-server": (other.pid, "1")}))
            assert sandbox("stop", server.folder) == (0, "", "")
            assert other.poll() is None
        finally:
            other.kill()


def test_a_port_that_was_taken_meanwhile_is_said(server):
    port = int(server.url.rpartition(":")[2].removesuffix("/0"))
    server.stop()
    with socket.create_server(("127.0.0.1", port)):
        code, out, err = sandbox("start", server.folder)
    assert (code, out) == (1, "")
    assert err.startswith("error: redis-server ended at its start: ")
    assert f"Failed listening on port {port}" in err


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "somebody's").touch()
    for command, folder, message in (
        ("start", tmp_path, "is not empty and no sandbox; name a new folder"),
        ("start", tmp_path / "two words", "has a space"),
        ("stop", tmp_path, "holds no sandbox"),
    ):
        code, _, err = sandbox(command, folder)
        assert code == 1
        assert err.startswith("error: ")
        assert message in err
        assert len(err.splitlines()) == 1
