"""Untrusted text never controls a terminal, and damaged input gives one error line."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace

import pytest
from rich.table import Table

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import load_config
from megatron_rlpt.errors import CheckpointError, ConfigError, TrainingError
from megatron_rlpt.observe import terminal
from megatron_rlpt.observe.log import get_logger, setup_logging
from megatron_rlpt.plain_text import one_line, plain
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

EVIL = "a\x1b]0;title\x07\x1b[31mred\x9b2J\r\x08\x7f \u202egnp\u2066 \u200b\ufeff\U000e0041 [bold red]x[/] \ud800 z"
FORBIDDEN = "\x1b\x07\x9b\r\x08\x7f\u202e\u2066\u200b\ufeff\U000e0041\ud800"


def harmless(text: str, *, shown: str = "[bold red]x[/]") -> None:
    assert not set(FORBIDDEN) & set(text), ascii(text)
    assert shown in text, "and markup is shown as it is"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    run = {"run": {"dir": str(tmp_path / "run")}, "model": {"path": str(tmp_path / "model")}, "train": {"steps": 3}}
    path.write_text(json.dumps(run | {"data": {"sources": [{"path": "corpus.jsonl"}]}}))
    return path


def evil_group() -> Group:
    episode = Episode(EVIL.replace("\ud800", ""), (1,), (2,), EVIL[:9], EVIL[:9], 0)
    candidates = (Candidate(Source.ORIGINAL, (1,)), Candidate(Source.ROLLOUT, (2,), 0, 1, "length", (-1.0,)))
    said = EVIL.replace("\ud800", "")
    return Group(episode, candidates, (Reward(1.0, said, said, {}), Failed(said + "\nerror: forged", {})))


def test_text_is_kept_and_only_what_a_terminal_obeys_is_written_out():
    for harmless_text in ("naïve café", "日本語のテキスト", "👩‍👩‍👧 ❤️", "می‌خواهم", "a\\x1b", "हिन्दी"):
        assert plain(harmless_text) == harmless_text
    assert plain("\x1b[31m\u202e\n\t") == "\\x1b[31m\\u202e\\x0a\\x09"
    assert one_line("a\n b\r\x1bc\u2028d") == "a b \\x1bc d"


def test_tables_and_lines_of_a_console_take_neither_markup_nor_escapes():
    out = io.StringIO()
    console = terminal.console(file=out, width=200)
    table = Table(EVIL)
    table.add_row(EVIL)
    console.print(table, EVIL)
    harmless(out.getvalue())
    assert out.getvalue().count("\\x1b]0;title") == 3


def test_an_error_line(rlpt, file, monkeypatch):
    def fail(*_, **__):
        raise TrainingError(EVIL + "\nerror: forged")

    monkeypatch.setattr("megatron_rlpt.trainer.run.run_training", fail)
    code, _, err = rlpt("train", "-c", file)
    assert code == TrainingError.exit_code
    harmless(err)
    assert len(err.splitlines()) == 1


def test_file_names(rlpt, tmp_path):
    code, _, err = rlpt("config", "-c", tmp_path / ("\x1b[31mevil[red]\u202e\n.yaml"))
    assert code == ConfigError.exit_code
    harmless(err, shown="evil[red]")
    assert len(err.splitlines()) == 1


def test_values_of_a_configuration(rlpt, file):
    name = json.dumps("\x1b[31m\u202e[red]")
    for arguments in ((), ("--get", "data.sources"), ("--get", "buffer.name")):
        _, out, err = rlpt("config", "-c", file, f"data.sources=[{{path: {name}}}]", *arguments)
        assert not set(FORBIDDEN) & set(out + err), ascii(out + err)


def test_the_log(tmp_path, capfd):
    setup_logging(tmp_path)
    get_logger("odd").warning(EVIL + "\nforged", field=EVIL + "\nforged")
    try:
        raise ValueError(EVIL)
    except ValueError:
        get_logger("odd").exception("a bug")
    for text in (capfd.readouterr().err, (tmp_path / "run.log").read_text()):
        harmless(text)
        assert len([line for line in text.splitlines() if line.startswith("forged")]) == 0


def test_groups_in_the_buffer(rlpt, file, tmp_path):
    (tmp_path / "run").mkdir()
    buffer = open_buffer(load_config(file))
    fencing_token = buffer.attach("run", 0, capacity=4, max_attempts=1)
    buffer.put(fencing_token, [(0, replace(evil_group(), rewards=())), (1, replace(evil_group(), rewards=()))])
    buffer.announce("worker", "\x1b[31mworker[red]", '{"host": "\x1b[2J"}', 60.0)
    one, two = buffer.claim("\x1b[31mworker[red]", 2, 60.0, "lease")
    buffer.complete(one, evil_group())
    buffer.give_back(two, "\x1b[31mreason[red]\nforged")
    buffer.close()
    for command in ("tail", "stats", "requeue"):
        code, out, err = rlpt("buffer", command, "-c", file)
        assert code == 0, err
        harmless(out, shown="[red]")
        assert "\nforged" not in out
    assert len(rlpt("buffer", "tail", "-c", file)[1].splitlines()) == 2


def test_the_state_of_a_launched_run(rlpt, tmp_path):
    folder = tmp_path / "run/cluster/status"
    folder.mkdir(parents=True)
    log = tmp_path / "a.log"
    log.write_bytes(EVIL.encode("utf-8", "replace") + b"\xff\n")
    said = {"component": EVIL[:-3], "role": "trainer", "state": EVIL[:-3], "host": EVIL[:-3], "pid": 7, "log": str(log)}
    said |= {"since": 0.0, "time": time.time(), "starts": 1, "start": "1"}
    (folder / "trainer-0.json").write_text(json.dumps(said))
    (folder / "odd.json").write_text('{"component": 1}')
    beat = {"time": time.time(), "state": "running", "step": 1, "steps": 9, "stage": EVIL[:9], "seconds_there": 1.0}
    troubles = "3 of the last 4 steps left no example; most frequent: 8 x \x1b[31mtie[red]"
    (tmp_path / "run/heartbeat.json").write_text(json.dumps(beat | {"troubles": troubles}))
    code, out, err = rlpt("status", tmp_path / "run")
    assert code == 0, err
    harmless(out)
    assert "3 of the last 4 steps left no example; most frequent: 8 x" in out


@pytest.mark.parametrize("heartbeat", ["", "{", "[]", '{"step": 1}', "\x00", "[" * 100_000])
def test_a_damaged_heartbeat_is_passed_over(rlpt, tmp_path, heartbeat):
    (tmp_path / "cluster/jobs").mkdir(parents=True)
    (tmp_path / "cluster/jobs/run").write_bytes(b"\xff12")
    (tmp_path / "heartbeat.json").write_text(heartbeat)
    code, _, err = rlpt("status", tmp_path)
    assert (code, err) == (0, "")


# Damaged input to commands.

CONFIGS = {
    "binary": b"\x00\xff\xfe\x80" * 100,
    "utf-16": "run: {}".encode("utf-16"),
    "unknown alias": b"run: *x",
    "open bracket": b"run: [1, 2",
    "python object": b'run: !!python/object/apply:os.system ["true"]',
    "a list": b"- 1",
    "a number": b"1",
    "empty": b"",
    "deep": b"[" * 100_000,
    "deep and closed": b"{a: " * 5000 + b"1" + b"}" * 5000,
    "two of one key": b"run: {dir: a, dir: b}",
    "itself": b"base: run.yaml",
    "NUL": b'run: {dir: "a\\0b"}\nmodel: {path: m}\ntrain: {steps: 1}\ndata: {sources: [{path: c}]}',
    "half a character": b'run: {dir: a}\nmodel: {path: "\\uD800"}\ntrain: {steps: 1}\ndata: {sources: [{path: c}]}',
}


@pytest.mark.parametrize("damage", CONFIGS)
@pytest.mark.parametrize("command", ["config", "train"])
def test_a_damaged_configuration_is_one_line(rlpt, tmp_path, damage, command):
    path = tmp_path / "run.yaml"
    path.write_bytes(CONFIGS[damage])
    code, out, err = rlpt(command, "-c", path)
    assert code == ConfigError.exit_code, err
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("metrics.jsonl", b"\xff\xfe\n" * 3, CheckpointError),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", CheckpointError),
        ("metrics.jsonl", None, ConfigError),
        ("samples.jsonl", b'{"step": "x"}\n', CheckpointError),
        ("run-id", b"\xff\x00\x01", CheckpointError),
        ("run-id", None, ConfigError),
        ("checkpoints", b"a file", None),
        ("config.yaml", None, ConfigError),
    ],
)
def test_a_damaged_run_folder_is_one_line(rlpt, tiny_model, corpus, tmp_path, name, content, kind):
    """``content`` None creates a folder in place of the file."""
    run = tmp_path / "run"
    run.mkdir()
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    settings = {
        "run": {"dir": str(run)},
        "model": {"path": str(tiny_model), "dtype": "fp32"},
        "data": {"sources": [{"path": str(corpus)}], "suffix_length": 4, "min_prefix": 4, "max_prefix": 8},
        "objective": {"name": "ntp"},
        "candidates": {"rollouts": 0},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        "observe": {"tensorboard": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    code, _, err = rlpt("train", "-c", path)
    assert code == (kind or CheckpointError).exit_code, err
    assert "Traceback" not in err
    assert str(run) in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_a_full_disk_that_nobody_foresaw_is_one_line(rlpt, file, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "/data/\x1b[31mx")

    monkeypatch.setattr("megatron_rlpt.trainer.run.run_training", fail)
    code, _, err = rlpt("train", "-c", file)
    assert code == CheckpointError.exit_code
    assert err.startswith("error: /data/\\x1b[31mx could not be written (No space left on device)")
