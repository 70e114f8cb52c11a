"""Train and measure every row and seed of an experiment, several at a time; what is done is not done again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rlpt.config import load_config, to_yaml
from megatron_rlpt.distributed.processes import end_all, exit_code_of, start_child
from megatron_rlpt.errors import ExperimentError
from megatron_rlpt.experiments.measure import measured
from megatron_rlpt.experiments.spec import Experiment, RowRun
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.machine import inspect_machine

_POLL = 0.2
_PATIENCE = 60.0
"""Seconds that runs have to write a checkpoint when the experiment is interrupted."""
_TRAIN, _MEASURE = "train", "experiment measure"
_LAST = 2000
"""Characters of a log in which the error of a run is looked for."""


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    step: str
    """The command of ``rlpt``: first ``_TRAIN``, then ``_MEASURE``."""
    began: float


@dataclass
class _Progress:
    waiting: list[RowRun]
    running: dict[RowRun, _Running] = field(default_factory=dict)
    done: int = 0
    failed: dict[RowRun, str] = field(default_factory=dict)


def run_experiment(experiment: Experiment, jobs: list[RowRun], parallel: int, say: Callable[[str], None]) -> None:
    """Run ``jobs``, ``parallel`` at a time. One that fails does not stop others that do not start from it.

    A run is the same as ``rlpt train`` with the file that is written beside its folder, so it resumes where it was
    killed, and one that was trained elsewhere (by ``rlpt launch`` with that file) is only measured here. It is measured
    by another process, so that others go on meanwhile.

    Args:
        experiment: the experiment.
        jobs: from ``Experiment.jobs``.
        parallel: runs at a time; they share the cores.
        say: is told what happens.

    Raises:
        ExperimentError: runs failed; names the first. Or the second judge has no model yet.
    """
    _require_second_judge(experiment)
    for job in jobs:  # all are written before the first starts: a mistake in one shows at once
        _write_config(experiment, job)
    progress = _Progress(list(jobs))
    began = time.monotonic()
    try:
        while progress.waiting or progress.running:
            _start_ready(experiment, progress, parallel, say)
            _look_at_running(experiment, progress, parallel, say)
            time.sleep(_POLL if progress.running else 0.0)
    finally:
        end_all([one.process for one in progress.running.values()], _PATIENCE)
    minutes = (time.monotonic() - began) / 60
    say(f"{progress.done} of {len(jobs)} runs are trained and measured, in {minutes:.1f} minutes")
    if progress.failed:
        job, why = next(iter(progress.failed.items()))
        raise ExperimentError(
            f"{len(progress.failed)} of {len(jobs)} runs failed; the first is {job}: {why}; run the same command again "
            "when the cause is mended"
        )


def config_file(experiment: Experiment, job: RowRun) -> Path:
    """Return the file with the resolved configuration of a job."""
    return experiment.folder(job).with_suffix(".yaml")


def is_done(experiment: Experiment, job: RowRun) -> bool:
    """Whether a job is trained and measured."""
    return measured(experiment.folder(job), experiment.spec.measure, experiment.second_judge) is not None


def _write_config(experiment: Experiment, job: RowRun) -> None:
    path, text = config_file(experiment, job), to_yaml(experiment.config(job))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _require_second_judge(experiment: Experiment) -> None:
    """Refuse to train for hours what cannot be measured afterwards."""
    if (file := experiment.second_judge) is None:
        return
    path = load_config(file).teacher.path
    if path and not Path(path).is_dir():
        raise ExperimentError(
            f"measure.judge is {experiment.spec.measure.judge}, whose teacher.path {path} is no folder; train that "
            "judge first, or name another"
        )


def _start_ready(experiment: Experiment, progress: _Progress, parallel: int, say: Callable[[str], None]) -> None:
    unfinished = {*progress.waiting, *progress.running}
    for job in list(progress.waiting):
        needed = _needed(experiment, job)
        if failed := [one for one in needed if one in progress.failed]:
            progress.waiting.remove(job)
            progress.failed[job] = f"{failed[0]}, which it needs, failed"
        elif len(progress.running) < parallel and not unfinished.intersection(needed):
            progress.waiting.remove(job)
            if is_done(experiment, job):
                progress.done += 1
                continue
            progress.running[job] = _start(experiment, job, parallel, _TRAIN, time.monotonic())
            say(f"{job} runs")


def _needed(experiment: Experiment, job: RowRun) -> list[RowRun]:
    """Return the runs that have to be done before: the one that it starts from, the one that a judge compares with."""
    start, against = experiment.rows[job.row].start, experiment.spec.against
    compared = experiment.second_judge is not None and job.row != against
    return [RowRun(row, job.seed) for row in dict.fromkeys([start, against] if compared else [start]) if row]


def _start(experiment: Experiment, job: RowRun, parallel: int, step: str, began: float) -> _Running:
    arguments = {
        _TRAIN: ["-c", str(config_file(experiment, job))],
        _MEASURE: [str(experiment.file), "--row", job.row, "--seed", str(job.seed)],
    }
    command = [sys.executable, "-m", "megatron_rlpt", *step.split(), *arguments[step]]
    with _log_file(experiment, job).open("ab") as log:
        process = start_child(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(parallel))
    return _Running(process, step, began)


def _log_file(experiment: Experiment, job: RowRun) -> Path:
    return config_file(experiment, job).with_suffix(".log")


def _environment(parallel: int) -> Mapping[str, str]:
    """Share the cores: more threads than cores make small models several times slower."""
    threads = str(max(1, inspect_machine().usable_cores // parallel))
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}


def _look_at_running(experiment: Experiment, progress: _Progress, parallel: int, say: Callable[[str], None]) -> None:
    for job, one in list(progress.running.items()):
        if one.process.poll() is None:
            continue
        del progress.running[job]
        try:
            _require_success(experiment, job, one)
        except ExperimentError as error:
            progress.failed[job] = str(error)
            say(f"{job} failed: {error}")
            continue
        if one.step == _TRAIN:
            progress.running[job] = _start(experiment, job, parallel, _MEASURE, one.began)
            continue
        progress.done += 1
        left = len(progress.waiting) + len(progress.running)
        say(f"{job} is trained and measured after {(time.monotonic() - one.began) / 60:.1f} minutes; {left} to go")


def _require_success(experiment: Experiment, job: RowRun, one: _Running) -> None:
    if (code := exit_code_of(one.process.returncode)) == 0:
        return
    log = _log_file(experiment, job)
    said = log.read_bytes()[-_LAST:].decode(errors="replace").strip().splitlines()
    raise ExperimentError(f"rlpt {one.step} ended with {code} ({said[-1] if said else 'no output'}); see {log}")
