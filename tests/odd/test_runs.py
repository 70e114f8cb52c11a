"""Runs that fail: nothing is learned, a tracker is lost, the disk is full, files of the run are damaged."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.buffer.store_rules import HOLDER
from megatron_rlpt.config import load_config
from megatron_rlpt.errors import BufferUnavailableError, CheckpointError, ConfigError, NothingLearntError, TeacherError
from megatron_rlpt.types import Candidate, Failed, Group, Reward, Source

Answer = Callable[[Group], Group]


@pytest.fixture
def file(tiny_model, corpus, tmp_path):
    """Write the configuration of a next-token run of four steps, with ``sections`` merged over it."""

    def write(**sections: dict[str, Any]) -> Path:
        settings: dict[str, dict[str, Any]] = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(tiny_model), "dtype": "fp32"},
            "data": {"sources": [{"path": str(corpus)}], "suffix_length": 4, "min_prefix": 4, "max_prefix": 8},
            "objective": {"name": "ntp"},
            "candidates": {"rollouts": 0},
            "train": {"steps": 4, "global_batch": 2, "micro_batch": 2},
            "checkpoint": {"every": 1},
            "observe": {"tensorboard": False},
        }
        for name, values in sections.items():
            settings[name] = settings.get(name, {}) | values
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        return path

    return write


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def only_line(err: str) -> str:
    assert "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.rstrip().endswith(line), err
    return line


@contextlib.contextmanager
def worker(config: Path, answer: Answer) -> Iterator[None]:
    """Run a judge worker that returns ``answer(group)`` for every group."""
    over = threading.Event()

    def work() -> None:
        settings = load_config(config)
        Path(settings.run.dir).mkdir(parents=True, exist_ok=True)
        buffer = open_buffer(settings)
        while not over.wait(0.02):
            with contextlib.suppress(BufferUnavailableError):  # a full disk
                for number, one in enumerate(buffer.claim("worker", 9, 60.0, os.urandom(8).hex())):
                    assert buffer.complete(one, answer(one.group)), number
        buffer.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def judged(name: str, **more: Any) -> dict[str, dict[str, Any]]:
    """Return the sections of a run whose workers rewrite, and judge if the objective needs rewards."""
    return {
        "objective": {"name": name},
        "candidates": {"rollouts": 0, "rewrite": True, "original": name != "sft_rewrite"},
        "teacher": {"run_in": "workers", "max_failure_rate": 1.0} | more,
    }


def rejected(group: Group) -> Group:
    """Return a group as judged by a server that refuses every request."""
    failed = Failed("request rejected", {"status": 400, "message": "unsupported parameter: max_tokens"})
    return replace(group, rewrite_failure=failed, rewards=(failed,) * len(group.candidates))


def rewritten(group: Group, tokens: tuple[int, ...], *scores: float) -> Group:
    candidates = (*group.candidates, Candidate(Source.REWRITE, tokens, seed=1, finish_reason="length"))
    return replace(group, candidates=candidates, rewards=tuple(Reward(score, "j", "1") for score in scores))


def no_text(group: Group) -> Group:
    done = rewritten(group, (5, 6, 7, 8), 1.0, 2.0)
    return replace(done, rewards=(Failed("empty candidate"),) * 2)


NOTHING = {
    "rewrites": (
        "sft_rewrite",
        lambda group: replace(rejected(group), rewards=()),
        "8 x rewrite failed: request reject",
    ),
    "judgments": ("rf_nll", rejected, "8 x candidate failed: request rejected"),
    "ties": ("rf_nll", lambda group: rewritten(group, (5, 6, 7, 8), 1.0, 1.0), "8 x tie"),
    "copies": ("rf_nll", lambda group: rewritten(group, group.episode.suffix, 1.0, 2.0), "8 x duplicate candidate"),
    "no text": ("rf_nll", no_text, "16 x candidate failed: empty candidate"),
}


@pytest.mark.parametrize("why", NOTHING)
def test_a_run_that_learns_nothing_says_why_and_is_no_success(rlpt, file, tmp_path, why):
    objective, answer, reason = NOTHING[why]
    config, run = file(**judged(objective)), tmp_path / "run"
    with worker(config, answer):
        code, _, err = rlpt("train", "-c", config)
    assert code == NothingLearntError.exit_code == 77, err
    line = only_line(err)
    assert "none of 4 steps left an example" in line
    assert reason in line
    assert ("unsupported parameter: max_tokens" in line) == (answer is rejected or why == "rewrites")
    assert not (run / "export").exists(), "the starting model is no result"
    assert err.count("nothing to learn from in this step") == 4, "it says so while it runs"
    assert "nothing to learn from in this step" in (run / "run.log").read_text()
    metrics = lines(run / "metrics.jsonl")
    assert [(row["examples"], row["skipped"], row["empty_share"]) for row in metrics] == [(0, 2, 1)] * 4
    samples = lines(run / "samples.jsonl")
    assert all(row["skipped"] and sum(row["skipped_in_step"].values()) == 2 for row in samples)
    assert len(samples) == 8
    if why == "rewrites":
        assert {row["rewrite_failure_rate"] for row in metrics} == {1}
        assert {row["failed_rewrites/request_rejected"] for row in metrics} == {2}
        assert samples[0]["rewrite"]["failed"] == "request rejected"
    assert "none of 4 steps left an example" in json.loads((run / "heartbeat.json").read_text())["state"]


def test_a_run_that_stops_learning_ends_and_goes_on_where_it_was_once_that_is_mended(rlpt, file, tmp_path):
    config = file(**judged("rf_nll"), train={"steps": 9, "global_batch": 2, "micro_batch": 2, "empty_window": 3})
    seen = []

    def at_first(group: Group) -> Group:
        seen.append(group)
        return rewritten(group, (5, 6, 7, 8), 1.0, 2.0 if len(seen) <= 4 else 1.0)

    with worker(config, at_first):
        code, _, err = rlpt("train", "-c", config)
    assert code == 77, err
    assert "3 of the last 3 steps left no example (100%, more than train.max_empty_share = 0.9)" in only_line(err)
    run = tmp_path / "run"
    assert [row["examples"] for row in lines(run / "metrics.jsonl")] == [2, 2, 0, 0, 0]
    with worker(config, lambda group: rewritten(group, (5, 6, 7, 8), 1.0, 2.0)):
        code, _, err = rlpt("train", "-c", config)
    assert code == 0, err
    assert [row["examples"] for row in lines(run / "metrics.jsonl")] == [2, 2, 0, 0, 0, 2, 2, 2, 2]
    assert (run / "export/model.safetensors").is_file()
    assert "without_example=3" in err


def test_failed_rewrites_above_the_rate_pause_the_run_with_their_reason(rlpt, file):
    config = file(**judged("sft_rewrite", max_failure_rate=0.2), buffer={"max_pause": 0.5})
    with worker(config, lambda group: replace(rejected(group), rewards=())):
        code, _, err = rlpt("train", "-c", config)
    assert code == TeacherError.exit_code, err
    assert "100% of a batch" in only_line(err)
    assert "x request rejected" in only_line(err)


# Trackers.


@pytest.fixture
def wandb(monkeypatch) -> ModuleType:
    """A package that acts as wandb 0.31 does; ``trouble`` is what comes of ``init``, ``log`` and ``finish``."""
    module = ModuleType("wandb")
    module.trouble, module.modes = {}, []

    def act(what: str) -> None:
        if (trouble := module.trouble.get(what)) is not None:
            raise trouble

    class Run:
        def log(self, data: Any, step: int) -> None:
            act("log")

        def finish(self, exit_code: int) -> None:
            act("finish")

    def init(mode: str = "online", **_: Any) -> Run:
        module.modes.append(mode)
        if mode == "online":
            act("init")
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class UsageError(Exception):
    """As wandb's."""


class CommError(Exception):
    """As wandb's."""


class AuthenticationError(CommError):
    """As wandb's."""


@pytest.mark.parametrize(
    ("trouble", "modes"),
    [
        ({"init": UsageError("No API key configured. Use `wandb login` to log in.")}, ["online", "offline"]),
        ({"init": CommError("Timed out while retrying: connection refused\nConsider")}, ["online", "offline"]),
        ({"init": OSError(28, "No space left on device")}, ["online", "online"]),
        ({"log": ConnectionResetError("Connection lost"), "finish": ConnectionResetError("lost")}, ["online"]),
        ({"finish": SystemExit(1)}, ["online"]),
    ],
)
def test_a_lost_tracker_ends_no_run_and_is_said_once(rlpt, file, tmp_path, wandb, monkeypatch, trouble, modes):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.trouble = trouble
    code, _, err = rlpt("train", "-c", file(observe={"tensorboard": False, "wandb_project": "mine"}))
    assert code == 0, err
    assert "Traceback" not in err
    assert err.count("tracker lost") + err.count("wandb records offline") == 1, err
    assert wandb.modes == modes
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 4


@pytest.mark.parametrize(
    ("trouble", "mode", "named"),
    [
        (UsageError("Invalid project name 'a/b': cannot contain characters"), None, "Invalid project name"),
        (AuthenticationError("WANDB_API_KEY invalid: API key must have 40+ characters, has 3."), None, "has 3"),
        (ValueError("1 validation error for Settings\nmode\n  Input should be"), None, "1 validation error"),
        (UsageError("No API key configured. Use `wandb login` to log in."), "online", "WANDB_MODE is online"),
    ],
)
def test_a_tracker_that_refuses_its_configuration_is_one_line(rlpt, file, wandb, monkeypatch, trouble, mode, named):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    wandb.trouble = {"init": trouble}
    code, _, err = rlpt("train", "-c", file(observe={"tensorboard": False, "wandb_project": "a/b"}))
    assert code == ConfigError.exit_code, err
    assert "observe.wandb_project is 'a/b'" in only_line(err)
    assert named in only_line(err)


def test_tensorboard_that_cannot_write_ends_no_run(rlpt, file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("in the way")
    code, _, err = rlpt("train", "-c", file(observe={"tensorboard": True}))
    assert code == 0, err
    assert err.count("tracker lost") == 1


# Full disks.


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mount a real file system of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here: " + mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as handle:
        while handle.write(b"0" * 4096):
            pass


def after_step(monkeypatch, number: int, do: Callable[[], object]) -> None:
    from megatron_rlpt.trainer.observer import RunObserver

    step = RunObserver.step

    def told(self: RunObserver, *arguments: Any) -> None:
        if arguments[0] == number:
            do()
        step(self, *arguments)

    monkeypatch.setattr(RunObserver, "step", told)


def test_a_full_disk_ends_the_run_where_it_matters_and_nowhere_else(rlpt, file, disk, monkeypatch):
    run = disk / "run"
    config = file(run={"dir": str(run)}, checkpoint={"every": 3}, observe={"tensorboard": True})
    with monkeypatch.context() as patched:
        after_step(patched, 1, lambda: fill(disk))
        code, out, err = rlpt("train", "-c", config)
    assert code == CheckpointError.exit_code, err
    assert "could not be written" in only_line(err)
    assert out.count("step ") >= 3, "the steps that need no space are made"
    assert all(
        err.count(f"cannot be written now; the run continues file={run / name}") <= 1 for name in os.listdir(run)
    )
    (disk / "filler").unlink()
    code, _, err = rlpt("train", "-c", config, "--fresh")
    assert code == 0, err


def test_what_a_full_disk_did_not_take_is_written_once_there_is_room(rlpt, file, disk, monkeypatch):
    run = disk / "run"
    batch, shown = {"steps": 4, "global_batch": 8, "micro_batch": 2}, {"samples_per_step": 8, "tensorboard": False}
    config = file(run={"dir": str(run)}, checkpoint={"every": 9}, train=batch, observe=shown)
    with monkeypatch.context() as patched:
        after_step(patched, 1, lambda: fill(disk))
        after_step(patched, 3, (disk / "filler").unlink)
        code, _, err = rlpt("train", "-c", config)
    assert code == 0, err
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [row["step"] for row in lines(run / "samples.jsonl")] == sorted([*range(4)] * 8)
    assert err.count("samples.jsonl") == 1, "that it could not be written is said once"
    assert "Traceback" not in err


def test_malformed_records_that_a_full_disk_does_not_take_end_no_run(rlpt, file, corpus, disk, tmp_path, monkeypatch):
    run, good = disk / "run", corpus.read_text().splitlines()
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("".join(line + "\n" + "broken " * 40 + "\n" for line in good[:40]))
    data = {"sources": [{"path": str(damaged)}], "max_bad_fraction": 0.6, "shuffle_buffer": 1}
    cut = {"suffix_length": 4, "min_prefix": 4, "max_prefix": 8, "episodes_per_document": 1}
    batch = {"steps": 5, "global_batch": 6, "micro_batch": 2}
    config = file(run={"dir": str(run)}, data=data | cut, train=batch, checkpoint={"every": 9})
    with monkeypatch.context() as patched:
        after_step(patched, 1, lambda: fill(disk))
        after_step(patched, 3, (disk / "filler").unlink)
        code, _, err = rlpt("train", "-c", config)
    assert code == 0, err
    assert err.count("quarantine file not writable now") == 1
    written = [row["offset"] for row in lines(run / "quarantine.jsonl")]
    assert written == sorted(set(written))
    counted = lines(run / "metrics.jsonl")[-1]["data/malformed"]
    assert 29 <= counted <= len(written) <= counted + batch["global_batch"], "the next batch is read ahead"


@pytest.mark.parametrize("own", [True, False], ids=["of its own", "of the run"])
def test_a_full_disk_under_the_rollout_buffer_keeps_what_was_learnt(rlpt, file, disk, tmp_path, monkeypatch, own):
    run = tmp_path / "run" if own else disk / "run"
    batch = {"steps": 6, "global_batch": 32, "micro_batch": 8}
    sections = judged("rf_nll") | {"run": {"dir": str(run)}, "train": batch, "checkpoint": {"every": 100}}
    config = file(**sections, buffer={"url": f"sqlite:///{disk / 'buffer.sqlite'}"})
    with worker(config, lambda group: rewritten(group, (5, 6, 7, 8), 1.0, 2.0)):
        with monkeypatch.context() as patched:
            after_step(patched, 1, lambda: fill(disk))
            code, _, err = rlpt("train", "-c", config)
        assert code == (BufferUnavailableError if own else CheckpointError).exit_code, err
        assert ("because the disk is full" if own else "could not be written") in only_line(err)
        assert [path.name for path in (run / "checkpoints").glob("step-*[0-9]")] == ["step-00000002"] * own
        (disk / "filler").unlink()
        with contextlib.closing(open_buffer(load_config(config))) as buffer:
            buffer.withdraw(HOLDER, HOLDER)  # in other cases the process that held it has ended
        code, _, err = rlpt("train", "-c", config)
    assert code == 0, err
    assert ("resumed" in err) == own
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [*range(6)]


def test_a_disk_that_is_full_from_the_start_is_one_line(rlpt, file, disk):
    config = file(run={"dir": str(disk / "run")})
    fill(disk)
    code, _, err = rlpt("train", "-c", config)
    assert code == CheckpointError.exit_code, err
    only_line(err)


def test_output_that_nobody_can_read_ends_no_run(rlpt, file, tmp_path, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        code, _, err = rlpt("train", "-c", file())
    with contextlib.suppress(OSError):
        full.close()
    assert code == 0, err
    assert err.count("progress is no longer shown") == 1
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 4
