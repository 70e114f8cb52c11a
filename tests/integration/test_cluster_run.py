"""Trainer, judge workers and Redis in separate processes, each killed: nothing is lost or trained on twice, and the run
ends with the weights of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from prefork import Forked
from redis_server import RedisServer
from slurm_launches import QUICK
from tiny_runs import finish, json_lines, lasting_metrics, only_error, rlpt_process, start, write_config

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.config import load_config
from megatron_rlpt.teacher.settings_fingerprint import SETTINGS, settings_fingerprint
from megatron_rlpt.trainer.stop import STOP_FILE

pytestmark = pytest.mark.redis

STEPS = 10
SECTIONS = {
    "model": {"dtype": "bf16"},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "staleness": 1},
    "checkpoint": {"every": 2},
}
WORKERS = {"own_model": True, "groups": 2, "lease": 2.0, "metrics_port": -1}


def judge(config: Path, *arguments: str) -> Forked:
    """Start ``rlpt judge serve``."""
    return rlpt_process("judge", "serve", "-c", str(config), *arguments)


def train(config: Path) -> Forked:
    """Start ``rlpt train``; trainers with vLLM, which starts in ten times as long, are killed in test_world_run.py."""
    return start(config, *QUICK)


def kill(process) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(json_lines(path)) if path.exists() else 0


def await_steps(folder: Path, count: int, trainer) -> None:
    deadline = time.monotonic() + 240
    while steps_done(folder) < count:
        assert trainer.poll() is None, finish(trainer)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def workers(*configs: Path):
    """Judge workers; those still running at the end are stopped and must exit cleanly."""
    running = [judge(config) for config in configs]
    try:
        yield running
        for worker in running:
            worker.send_signal(signal.SIGTERM)
        for worker in running:
            _, err = worker.communicate(timeout=120)
            assert worker.returncode == 0, err
    finally:
        for worker in running:
            if worker.poll() is None:
                kill(worker)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("cluster") / "redis") as running:
        yield running


def configured(base: Path, model: Path, corpus: Path, server: RedisServer) -> tuple[Path, Path]:
    folder = base / "run"
    buffer = {**server.options, "name": base.name}
    teacher = {"run_in": "workers", "workers": WORKERS}
    return write_config(base / "run.yaml", model, corpus, folder, buffer=buffer, teacher=teacher, **SECTIONS), folder


@pytest.fixture(scope="module")
def calm(served_model, corpus, server, tmp_path_factory) -> Path:
    """An undisturbed run, in which no process is killed."""
    config, folder = configured(tmp_path_factory.mktemp("calm"), served_model, corpus, server)
    with workers(config):
        code, _, err = finish(train(config))
    assert code == 0, err
    return folder


def test_everybody_is_killed_once_and_the_run_ends_with_the_same_weights(
    calm, served_model, corpus, server, tmp_path_factory
):
    config, folder = configured(tmp_path_factory.mktemp("killed"), served_model, corpus, server)
    buffer = open_url(**server.options, name=folder.parent.name)
    with workers(config, config) as judges:
        trainer = train(config)
        try:
            await_steps(folder, 2, trainer)
            kill(judges.pop(0))
            judges.append(judge(config))

            await_steps(folder, 4, trainer)
            buffer.drain(True)  # so that the run does not end before the next kill
            server.kill()
            server.start()
            buffer.drain(False)

            await_steps(folder, 6, trainer)
            buffer.drain(True)
            kill(trainer)
            buffer.drain(False)
            assert steps_done(folder) < STEPS, "the run was over before its trainer was killed"
            trainer = train(config)
            code, _, err = finish(trainer)
        finally:
            if trainer.poll() is None:
                kill(trainer)
    assert code == 0, err
    assert "resumed" in (folder / "run.log").read_text()
    assert lasting_metrics(folder) == lasting_metrics(calm)
    assert [row["step"] for row in lasting_metrics(folder)] == list(range(STEPS))
    for name in ("model.safetensors", "config.json"):
        assert (folder / "export" / name).read_bytes() == (calm / "export" / name).read_bytes()
    stats = buffer.stats()
    buffer.close()
    assert (stats.acknowledged, stats.queued, stats.finished, stats.dead) == (STEPS * 4, 0, 0, 0)


def test_told_to_stop_while_no_judge_is_there_it_stops_and_loses_nothing(
    served_model, corpus, server, tmp_path_factory
):
    config, folder = configured(tmp_path_factory.mktemp("stopped"), served_model, corpus, server)
    trainer = train(config)
    try:
        deadline = time.monotonic() + 240
        while (
            not (folder / "heartbeat.json").exists()
            or '"stage": "judge"' not in (folder / "heartbeat.json").read_text()
        ):
            assert trainer.poll() is None, finish(trainer)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (folder / STOP_FILE).touch()
        code, _, err = finish(trainer)
        assert code == 75, err
        assert "stopped after 0 of" in err
        with workers(config):
            trainer = train(config)
            code, _, err = finish(trainer)
    finally:
        if trainer.poll() is None:
            kill(trainer)
    assert code == 0, err
    assert [row["step"] for row in lasting_metrics(folder)] == list(range(STEPS))
    with contextlib.closing(open_url(**server.options, name=folder.parent.name)) as buffer:
        stats = buffer.stats()
    assert (stats.acknowledged, stats.queued, stats.finished, stats.dead) == (STEPS * 4, 0, 0, 0)


def test_every_rollout_is_as_old_as_it_should_be(calm):
    before = [0, *[row["version"] for row in lasting_metrics(calm)]]
    ages = [
        (row["step"], before[row["step"]] - candidate["version"])
        for row in json_lines(calm / "samples.jsonl")
        for candidate in row["candidates"]
        if candidate.get("version") is not None
    ]
    assert {age for step, age in ages if step > 0} == {1}
    assert {age for step, age in ages if step == 0} == {0}


def test_a_worker_with_other_settings_than_the_trainer_is_refused(calm, tmp_path, served_model, corpus, server):
    buffer = {**server.options, "name": calm.parent.name}
    teacher = {"run_in": "workers", "workers": WORKERS, "likelihood": {"repetition_weight": 1.0}}
    config = write_config(
        tmp_path / "other.yaml", served_model, corpus, calm, buffer=buffer, teacher=teacher, **SECTIONS
    )
    with contextlib.closing(open_url(**server.options, name=calm.parent.name)) as store:
        # The trainer announces itself while it runs.
        store.announce(SETTINGS, "trainer", settings_fingerprint(load_config(calm.parent / "run.yaml")), 60.0)
        code, _, err = finish(judge(config))
        store.withdraw(SETTINGS, "trainer")
    assert code == 2
    assert only_error(err).startswith("error: teacher.likelihood.repetition_weight is 1.0 for this worker and 6.0 for")


def test_several_workers_that_cannot_start_end_with_the_reason_of_one(calm, tmp_path, served_model, corpus):
    buffer = {"url": "redis://127.0.0.1:1/0", "retry": 0.1}
    teacher = {"run_in": "workers", "workers": WORKERS}
    config = write_config(tmp_path / "run.yaml", served_model, corpus, calm, buffer=buffer, teacher=teacher, **SECTIONS)
    code, _, err = finish(judge(config, "--workers", "2"))
    assert code == 9
    assert "127.0.0.1:1" in err
    assert "Traceback" not in err
