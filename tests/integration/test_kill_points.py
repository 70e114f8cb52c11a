"""A run that is killed at any instant and restarted equals an undisturbed one; of two trainers of one run folder, one
is refused. Real processes, real SIGKILL.

    RLPT_KILL_POINTS=30 pytest -s tests/integration/test_kill_points.py    # 30 points instead of a few

The run generates one batch ahead of training, in the background, and samples with Megatron's engine, which starts
faster than vLLM. Kill points are spread over the whole run: before the first checkpoint, during a checkpoint, and
before, during and after the export.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from prefork import MEGATRON, forked
from tiny_runs import finish, json_lines, lasting_metrics, only_error, write_config

from megatron_rlpt.errors import CheckpointError, RunStopped

POINTS = int(os.environ.get("RLPT_KILL_POINTS", "3"))
STEPS, EVERY = 7, 3
SECTIONS = {
    "model": {"dtype": "bf16"},
    "rollout": {"engine": "megatron"},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "staleness": 1},
    "optimizer": {"lr": 1e-3, "decay": "constant"},
    "checkpoint": {"every": EVERY},
    "observe": {"samples_per_step": 2, "tensorboard": False},
}


def start(config, *arguments):
    command = ["-m", "megatron_rlpt", "train", "-c", str(config), *arguments]
    return forked(MEGATRON, [os.sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})


def configure(base, model, corpus, **changes):
    base.mkdir(parents=True, exist_ok=True)
    return write_config(base / "run.yaml", model, corpus, base / "run", **SECTIONS | changes)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, corpus, tmp_path_factory):
    base = tmp_path_factory.mktemp("uninterrupted")
    code, _, err = finish(start(configure(base, tiny_model, corpus)))
    assert code == 0, err
    return base / "run"


def results(folder):
    """Return everything that must be the same, however often the run was killed."""
    return {
        "weights": (folder / "export/model.safetensors").read_bytes(),
        "metrics": lasting_metrics(folder),
        "samples": json_lines(folder / "samples.jsonl"),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "state": (folder / f"checkpoints/step-{STEPS:08d}/state.json").read_text().replace(str(folder), "RUN"),
    }


def events(folder):
    """Return the number of finished stages."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "trace.jsonl").read_text().count('"ph": "X"')
    return 0


def kill_at(process, reached, delay):
    """Kill the run and its children ``delay`` seconds after ``reached``; return whether the run was still going."""
    while not reached():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    return finish(process)[0] == -signal.SIGKILL


def points(folder, draw, total):
    """Return kill points of a run in ``folder``: a name, a condition, and seconds after it holds."""
    checkpoints = folder / "checkpoints"
    fixed = [
        ("before anything is loaded", (folder / "lock").exists, 0.0),
        ("while the first checkpoint is written", lambda: any(checkpoints.glob("*.partial")), 0.0),
        ("while the export is written", lambda: any(folder.glob("export.partial-*")), 0.0),
        ("once the first checkpoint is there", lambda: any(checkpoints.glob(f"step-{EVERY:08d}")), 0.0),
        ("once the last checkpoint is there", (checkpoints / f"step-{STEPS:08d}").exists, draw.uniform(0, 0.05)),
        ("once the export is there", (folder / "export").exists, 0.0),
    ]
    while True:
        if fixed and draw.random() < 0.4:
            yield fixed.pop(0)
            continue
        stages = draw.randrange(total)
        yield f"after {stages} of {total} stages", lambda stages=stages: events(folder) >= stages, draw.uniform(0, 0.03)


def test_killed_anywhere_and_started_again_it_ends_the_same(uninterrupted, tiny_model, corpus, tmp_path):
    whole, total = results(uninterrupted), events(uninterrupted)
    assert [row["step"] for row in whole["metrics"]] == list(range(STEPS))
    seed = int(os.environ.get("RLPT_KILL_SEED", random.randrange(2**32)))
    print(f"\nkill points are drawn with seed {seed}")
    config = configure(tmp_path, tiny_model, corpus)
    folder, killed, over = tmp_path / "run", [], 0
    for name, reached, delay in points(folder, random.Random(seed), total):
        if len(killed) == POINTS:
            break
        shutil.rmtree(folder, ignore_errors=True)
        if not kill_at(start(config), reached, delay):
            over += 1
            continue
        rows = len(json_lines(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").exists() else 0
        published = [path.name for path in (folder / "checkpoints").glob("step-????????")]
        begin = time.monotonic()
        code, _, err = finish(start(config))
        assert code == 0, f"killed {name}: {err}"
        found = results(folder)
        wrong = [what for what in whole if found[what] != whole[what]]
        seconds = time.monotonic() - begin
        print(f"  {name}: {rows} steps, {published or 'no checkpoint'}; {seconds:.1f} s more; differs: {wrong or 'no'}")
        assert wrong == [], name
        assert (" starts over" in err) == (bool(rows) and not published)
        killed.append(name)
    print(
        f"{len(killed)} kill points, {over} came too late; weights, metrics, samples, checkpoints and state identical"
    )


@pytest.mark.parametrize("arguments", [(), ("--fresh",)])
def test_of_two_trainers_started_together_one_is_refused_and_the_other_is_as_if_alone(
    uninterrupted, tiny_model, corpus, tmp_path, arguments
):
    whole = results(uninterrupted)
    for turn in range(max(1, POINTS // 6)):
        config = configure(tmp_path / str(turn), tiny_model, corpus)
        folder = tmp_path / str(turn) / "run"
        both = [start(config, *arguments), start(config, *arguments)]
        ends = [finish(process) for process in both]
        assert sorted(code for code, _, _ in ends) == [0, CheckpointError.exit_code], ends
        refusal = next(err for code, _, err in ends if code)
        assert "is held by another trainer (process " in only_error(refusal)
        assert results(folder) == whole
        assert {path.name for path in (tmp_path / str(turn)).iterdir()} == {"run.yaml", "run"}, "nothing was moved away"


def test_a_second_trainer_in_the_middle_is_refused_and_moves_nothing_away(tiny_model, corpus, tmp_path):
    # Long enough to be running when the others start.
    config = configure(tmp_path, tiny_model, corpus, train=SECTIONS["train"] | {"steps": 10_000})
    folder = tmp_path / "run"
    first = start(config)
    while events(folder) < 3:
        assert first.poll() is None, finish(first)
        time.sleep(0.01)
    for arguments in ((), ("--fresh",)):
        code, _, err = finish(start(config, *arguments))
        assert code == CheckpointError.exit_code
        assert f"is held by another trainer (process {first.pid} on " in only_error(err)
        seen = events(folder)
        while events(folder) < seen + 6:
            assert first.poll() is None, finish(first)
            time.sleep(0.01)
        assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "run"}, "nothing was moved away"
    first.terminate()
    assert finish(first)[0] == RunStopped.exit_code


def test_killed_the_next_one_takes_over_at_once(tiny_model, corpus, tmp_path):
    config = configure(tmp_path, tiny_model, corpus)
    process = start(config)
    assert kill_at(process, (tmp_path / "run/lock").exists, 0.5)
    process = start(config)
    begin = time.monotonic()
    while events(tmp_path / "run") < 3:
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    assert time.monotonic() - begin < 60
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
