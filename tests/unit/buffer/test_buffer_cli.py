"""``rlpt buffer``, with every store."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from buffer_groups import group, items, judged

from megatron_rlpt.buffer.open import open_buffer, open_url
from megatron_rlpt.config import load_config

LONG = 600.0


@pytest.fixture
def options(store):
    """Options that name the buffer on the command line."""
    return [part for name, value in store.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture
def filled(buffer):
    """A buffer with group 0 taken, 1 judged, 2 dead, 3 leased, 4 queued."""
    fencing_token = buffer.attach("run-1", 0, capacity=100, max_attempts=1)
    buffer.put(fencing_token, items(*range(5)))
    first, second, third, _ = buffer.claim("judge-1", 4, LONG, "lease")
    buffer.complete(first, judged(first.group, 0.5))
    buffer.complete(second, judged(second.group, 0.25))
    buffer.remember(1, {"key": "good \ud800 bad"})
    buffer.give_back(third, "prompt too\nlong")
    buffer.take(fencing_token, 0, 1)
    return buffer


def test_stats(rlpt, options, filled):
    filled.announce("worker", "judge-1", "3 groups", LONG)
    filled.announce("endpoint", "a", "http://a/v1", LONG)
    code, out, err = rlpt("buffer", "stats", *options)
    assert (code, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert {"queued": "1", "leased": "1", "finished": "1", "taken": "1", "dead": "1"}.items() <= rows.items()
    assert {"run": "run-1", "capacity": "100", "next": "1", "draining": "False"}.items() <= rows.items()
    assert rows["workers"].split() == ["judge-1", "3", "groups"]
    assert rows["endpoints"].split() == ["a", "http://a/v1"]
    found = json.loads(rlpt("buffer", "stats", "--json", *options)[1])
    assert found.pop("oldest") >= 0
    assert found == {
        "queued": 1, "leased": 1, "finished": 1, "taken": 1, "dead": 1, "next": 1, "acknowledged": 0,
        "draining": False, "run": "run-1", "capacity": 100,
        "workers": {"judge-1": "3 groups"}, "endpoints": {"a": "http://a/v1"},
    }  # fmt: skip


def test_stats_of_an_empty_buffer(rlpt, options, buffer):
    code, out, _ = rlpt("buffer", "stats", *options)
    assert code == 0
    assert "workers       none\nendpoints     none\n" in out
    assert json.loads(rlpt("buffer", "stats", "--json", *options)[1])["oldest"] is None


def test_tail(rlpt, options, filled):
    code, out, _ = rlpt("buffer", "tail", *options)
    assert code == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "0 taken attempts 1 judge-1 episode-0 original 0.500, rollout failed (empty reply)",
        "1 finished attempts 1 judge-1 episode-1 original 0.250, rollout failed (empty reply)",
        "2 dead attempts 1 judge-1 episode-2 original failed (prompt too long), rollout failed (prompt too long)",
        "3 leased attempts 1 judge-1 episode-3",
        "4 queued attempts 0 episode-4",
    ]
    assert [line.split()[0] for line in rlpt("buffer", "tail", "--last=2", *options)[1].splitlines()] == ["3", "4"]


def test_tail_of_nothing(rlpt, options, buffer):
    assert rlpt("buffer", "tail", *options) == (0, "", "")


def test_tail_follows(options, filled):
    command = [sys.executable, "-m", "megatron_rlpt", "buffer", "tail", "--follow", "--last", "1", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        try:
            assert process.stdout.readline().split()[:2] == ["4", "queued"]
            (work,) = filled.claim("judge-2", 1, LONG, "other")
            assert process.stdout.readline().split()[:2] == ["4", "leased"]
            filled.complete(work, judged(work.group))
            assert process.stdout.readline().split()[:2] == ["4", "finished"]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_drain(rlpt, options, filled):
    assert rlpt("buffer", "drain", *options) == (0, "workers are given no more groups; 1 are leased\n", "")
    assert filled.claim("w", 1, LONG, "other") == []
    assert rlpt("buffer", "drain", "--off", *options) == (0, "workers are given groups again\n", "")
    assert len(filled.claim("w", 1, LONG, "other")) == 1


def test_requeue(rlpt, options, filled):
    code, out, _ = rlpt("buffer", "requeue", *options)
    assert code == 0
    number, when, rest = out.split(maxsplit=2)
    assert (number, rest) == ("2", "episode-2  attempts 1  prompt too long\n")
    assert abs(time.mktime(time.strptime(when, "%Y-%m-%dT%H:%M:%SZ")) - time.mktime(time.gmtime())) < 600
    assert rlpt("buffer", "requeue", "--number=7", "--number=0", *options)[1] == "0 groups queued again\n"
    assert rlpt("buffer", "requeue", "--number=2", *options)[1] == "1 groups queued again\n"
    assert rlpt("buffer", "requeue", *options)[1] == ""
    (work,) = [one for one in filled.claim("w", 2, LONG, "other") if one.sequence == 2]
    filled.give_back(work, "again")
    assert rlpt("buffer", "requeue", "--all", *options)[1] == "1 groups queued again\n"
    assert rlpt("buffer", "requeue", "--all", "--number=2", *options)[0] == 2


def test_export(rlpt, options, filled, tmp_path):
    target = tmp_path / "groups.jsonl"
    target.write_text("an older export")
    assert rlpt("buffer", "export", "--out", target, *options) == (0, f"wrote 5 groups to {target}\n", "")
    assert sorted(tmp_path.glob("*groups*")) == [target]
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(record["sequence"], record["state"]) for record in records] == [
        (0, "taken"), (1, "finished"), (2, "dead"), (3, "leased"), (4, "queued"),
    ]  # fmt: skip
    record, given = records[1], judged(group(1), 0.25)
    assert record["episode"]["prefix"] == list(given.episode.prefix)
    assert record["candidates"][1]["logprobs"] == list(given.candidates[1].logprobs)
    assert record["candidates"][1]["source"] == "rollout"
    assert record["rewards"][0] == {
        "value": 0.25, "judge": "judge", "prompt_version": "v1", "detail": {"replies": ["good", "bad"]}
    }  # fmt: skip
    assert record["rewards"][1] == {"reason": "empty reply", "detail": {"tries": 3}}
    assert record["replies"] == {"key": "good \ud800 bad"}
    assert (record["worker"], record["attempts"]) == ("judge-1", 1)
    code, out, _ = rlpt("buffer", "export", *options)
    assert (code, out) == (0, target.read_text())


def test_an_export_that_fails_leaves_the_older_one(rlpt, options, filled, tmp_path, monkeypatch):
    target = tmp_path / "groups.jsonl"
    target.write_text("an older export")
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, out, err = rlpt("buffer", "export", "--out", target, *options)
    assert (code, out) == (2, "")
    assert err == f"error: --out {target} cannot be written: No space left on device\n"
    assert sorted(tmp_path.glob("*groups*")) == [target]
    assert target.read_text() == "an older export"


def test_numbers_that_json_lacks_are_null(rlpt, options, buffer):
    odd = group(0)
    odd = replace(odd, candidates=(replace(odd.candidates[1], logprobs=(float("-inf"), float("nan"))),))
    buffer.put(buffer.attach("run", 0, capacity=9, max_attempts=1), [(0, odd)])
    (line,) = rlpt("buffer", "export", *options)[1].splitlines()
    assert json.loads(line)["candidates"][0]["logprobs"] == [None, None]


# Choosing the buffer.


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path}/runs/demo}}\nmodel: {{path: m}}\n"
        "data: {sources: [{path: a}]}\ntrain: {steps: 9}\n"
    )
    return path


def test_the_buffer_of_a_configuration(rlpt, config_file, tmp_path):
    code, _, err = rlpt("buffer", "stats", "--config", config_file)
    assert code == 9
    assert err.startswith(f"error: rollout buffer {tmp_path}/runs/demo/buffer.sqlite does not exist; ")
    open_buffer(load_config(config_file)).close()
    assert (tmp_path / "runs/demo/buffer.sqlite").is_file()
    open_url(f"sqlite:///{tmp_path}/runs/demo/buffer.sqlite", "demo", create=False).close()
    assert rlpt("buffer", "stats", "--config", config_file)[0] == 0
    code, _, err = rlpt("buffer", "stats", "--config", config_file, "buffer.name=other")
    assert (code, "has no rollout buffer 'other'; it has: demo" in err) == (9, True)


def test_the_store_of_a_configuration(rlpt, config_file, redis_server):
    overrides = [f"buffer.url={redis_server.url}", f"buffer.password_file={redis_server.password_file}"]
    open_buffer(load_config(config_file, overrides)).close()
    assert rlpt("buffer", "stats", "--config", config_file, *overrides)[0] == 0
    open_url(name="demo", create=False, **redis_server.options).close()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--url", "sqlite:///x"],
        ["--name", "x"],
        ["--config", "FILE", "--url", "sqlite:///x", "--name", "x"],
        ["--config", "FILE", "--password-file", "x"],
        ["--url", "sqlite:///x", "--name", "x", "buffer.retry=1"],
    ],
)
def test_a_buffer_has_to_be_named_in_one_way(rlpt, config_file, arguments):
    code, out, err = rlpt("buffer", "stats", *(config_file if part == "FILE" else part for part in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: name one buffer with --config FILE")


def test_nothing_heavy_is_imported_but_the_store_of_the_buffer(buffer, options, store):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'megatron', 'vllm', 'transformers', 'numpy', 'redis', 'sqlite3'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        "from megatron_rlpt.cli.main import entry\nentry()"
    )
    done = subprocess.run([sys.executable, "-c", code, "buffer", "stats", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"heavy: ['{'redis' if store['url'].startswith('redis') else 'sqlite3'}']\n")
