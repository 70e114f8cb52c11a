"""The SQLite file of a rollout buffer: refusals, waiting for other processes, and forks."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading

import pytest
from buffer_groups import items

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.buffer.sqlite_store import SqliteBuffer
from megatron_rlpt.errors import BufferUnavailableError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs/demo/buffer.sqlite"


def refusal(path, **options):
    with pytest.raises(BufferUnavailableError) as caught:
        SqliteBuffer(path, "demo", **{"retry": 0.2, **options})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_and_folder_are_made(path):
    SqliteBuffer(path, "demo").close()
    assert path.is_file()


def test_what_has_to_be_there_is_not_made(path):
    assert "buffer.sqlite does not exist" in refusal(path, create=False)
    assert not path.parent.exists()
    SqliteBuffer(path, "first").close()
    SqliteBuffer(path, "second").close()
    assert "has no rollout buffer 'demo'; it has: first, second" in refusal(path, create=False)
    SqliteBuffer(path, "second", create=False).close()


def test_files_that_are_no_buffer(path):
    path.parent.mkdir(parents=True)
    path.write_text("some notes of mine, which are longer than the header of a database and worth keeping\n" * 40)
    assert "is not a SQLite database; set another file" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "cannot be opened" in refusal(path)
    path.rmdir()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE recipes (name)")
    assert "is a database of another program" in refusal(path)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)


def test_a_folder_that_cannot_be_made(path):
    path.parent.parent.mkdir(parents=True)
    path.parent.write_text("a file where the folder should be")
    with pytest.raises(BufferUnavailableError, match=r"cannot create the folder of .*; set buffer\.url"):
        SqliteBuffer(path, "demo")


def test_another_format(path):
    SqliteBuffer(path, "demo").close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 7")
    assert "has format 7, this version uses 1" in refusal(path)


def test_damage_is_said(path):
    buffer = SqliteBuffer(path, "demo")
    buffer.put(buffer.attach("run", 0, capacity=500, max_attempts=1), items(*range(400)))
    buffer.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(BufferUnavailableError, match="is damaged; move it away"):
        list(SqliteBuffer(path, "demo").entries())


def test_a_locked_file_is_waited_for_and_then_named(path):
    buffer = SqliteBuffer(path, "demo", retry=0.2)
    with sqlite3.connect(path, isolation_level=None, check_same_thread=False) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            BufferUnavailableError, match=r"locked by another process for 0\.2 s; end it, or raise"
        ) as caught:
            buffer.announce("worker", "w", "", 60)
        assert str(path) in str(caught.value)
        assert buffer.announced("worker") == {}  # reading still works
        release = threading.Timer(0.3, lambda: other.execute("ROLLBACK"))
        release.start()
        SqliteBuffer(path, "demo", retry=60.0).announce("worker", "w", "", 60)
        release.join()
    assert buffer.announced("worker") == {"w": ""}


def test_a_step_that_fails_half_way_changes_nothing(path, monkeypatch):
    buffer = SqliteBuffer(path, "demo")
    fencing_token = buffer.attach("run", 0, capacity=10, max_attempts=1)
    add = SqliteBuffer._add

    def fail_at_the_second(self, db, sequence, *rest):
        add(self, db, sequence, *rest)
        if sequence == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(SqliteBuffer, "_add", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        buffer.put(fencing_token, items(0, 1))
    monkeypatch.undo()
    assert list(buffer.entries()) == []
    assert buffer.put(fencing_token, items(0, 1)) == 2


def test_a_forked_process_is_told_that_it_cannot_use_its_parents_file(path):
    buffer = SqliteBuffer(path, "demo")
    buffer.put(buffer.attach("run", 0, capacity=10, max_attempts=1), items(0, 1))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(RuntimeError):
            buffer.claim("child", 1, 600.0, "lease")
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [work.sequence for work in buffer.claim("parent", 2, 600.0, "lease")] == [0, 1]


def test_another_process_is_killed_in_the_middle_of_a_change(path):
    buffer = SqliteBuffer(path, "demo", retry=30.0)
    fencing_token = buffer.attach("run", 0, capacity=10, max_attempts=1)
    code = (
        "import sys, time\nfrom megatron_rlpt.buffer.sqlite_store import SqliteBuffer\n"
        "buffer = SqliteBuffer(sys.argv[1], 'demo')\nwith buffer._file.writing() as db:\n"
        "    buffer._add(db, 5, 'half', b'')\n    print('inside', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "inside\n"
        other.kill()
    assert buffer.put(fencing_token, items(0)) == 1
    assert [entry.sequence for entry in buffer.entries()] == [0]


@pytest.mark.parametrize("successor", [False, True])
def test_a_file_that_was_moved_away_is_not_used_in_secret(tmp_path, successor):
    """As ``rlpt train --fresh`` does with the folder of an earlier run whose workers are still running."""
    path = tmp_path / "run" / "buffer.sqlite"
    worker = open_url(f"sqlite:///{path}", "run")
    worker.announce("worker", "w", "{}", 60.0)
    path.parent.rename(tmp_path / "run.old-1")
    if successor:
        open_url(f"sqlite:///{path}", "run").close()
    if successor:
        assert worker.claim("w", 1, 60.0, "lease") == []
        worker.announce("worker", "w", "{}", 60.0)
        assert open_url(f"sqlite:///{path}", "run").announced("worker") == {"w": "{}"}
    else:
        with pytest.raises(BufferUnavailableError, match="was moved with its folder since it was opened"):
            worker.claim("w", 1, 60.0, "lease")
    worker.close()
