"""A run that is killed and resumed equals an undisturbed one; an unusable run folder is refused. Real processes, real
vLLM, real SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time

import pytest
from tiny_runs import (
    NEXT_TOKEN,
    evaluated_while_training,
    finish,
    json_lines,
    lasting_metrics,
    only_error,
    start,
    tiny_config,
    write_config,
)

from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.trainer.run import run_training

STEPS = 6
# bf16, so that the weights alone do not hold the state: restoring them without the fp32 copy of the optimizer, or
# slightly different ones, would change the rollouts two steps later.
SECTIONS = {
    "model": {"dtype": "bf16"},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2},
    "checkpoint": {"every": 2},
    "observe": {"samples_per_step": 4},
}


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def await_that(process, condition):
    while not condition():
        assert process.poll() is None, finish(process)
        time.sleep(0.002)


def kill(process):
    """Send SIGKILL to the run and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL, "the run ended before it was killed"


def events(folder):
    """Return the number of finished stages."""
    path = folder / "trace.jsonl"
    return path.read_text().count('"ph": "X"') if path.exists() else 0


def being_written_since(folder, moment):
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime > moment for path in (folder / "checkpoints").glob("*.partial"))
    return False


@pytest.fixture(scope="module")
def sections(corpus, tmp_path_factory):
    """The sections of the configuration, with an evaluation during the run on documents of their own."""
    return SECTIONS | evaluated_while_training(tmp_path_factory.mktemp("heldout"), corpus, 3)


@pytest.fixture(scope="module")
def uninterrupted(served_model, corpus, sections, tmp_path_factory):
    base = tmp_path_factory.mktemp("uninterrupted")
    folder = base / "run"
    code, out, err = finish(start(write_config(base / "run.yaml", served_model, corpus, folder, **sections)))
    assert code == 0, err
    (base / "out.txt").write_text(out)
    return folder


@pytest.fixture(scope="module")
def killed_twice(served_model, corpus, sections, tmp_path_factory):
    """The same run, killed at a random instant, resumed, killed during a checkpoint, and resumed again."""
    base = tmp_path_factory.mktemp("killed")
    folder = base / "run"
    config = write_config(base / "run.yaml", served_model, corpus, folder, **sections)

    seed = random.randrange(2**32)
    print(f"the instant of the first kill is drawn with seed {seed}")
    draw = random.Random(seed)
    # Two steps of six stages each lie between the first checkpoint and the second.
    stages, seconds = draw.randrange(12), draw.uniform(0, 0.03)
    process = start(config)
    await_that(process, lambda: "step-00000002" in checkpoints(folder))
    before = events(folder)
    await_that(process, lambda: events(folder) >= before + stages)
    time.sleep(seconds)
    kill(process)
    assert "step-00000006" not in checkpoints(folder)

    moment = time.time()
    process = start(config)
    await_that(process, lambda: being_written_since(folder, moment))
    kill(process)
    assert any(name.endswith(".partial") for name in checkpoints(folder)), "the checkpoint was complete already"

    code, _, err = finish(start(config))
    assert code == 0, err
    assert "removing an unfinished checkpoint" in err
    return folder


def test_told_to_stop_it_leaves_a_checkpoint_and_goes_on_from_there(
    uninterrupted, served_model, corpus, sections, tmp_path
):
    folder = tmp_path / "run"
    sections = sections | {"checkpoint": {"every": 100}}
    config = write_config(tmp_path / "run.yaml", served_model, corpus, folder, **sections)
    process = start(config)
    await_that(process, lambda: (folder / "metrics.jsonl").exists() and json_lines(folder / "metrics.jsonl"))
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    done = len(json_lines(folder / "metrics.jsonl"))
    assert 0 < done < STEPS, "the run was over before it was told to stop"
    assert err.strip().splitlines()[-1].startswith(f"stopped after {done} of {STEPS} steps")
    assert checkpoints(folder) == [f"step-{done:08d}"]
    assert json.loads((folder / "heartbeat.json").read_text())["state"].startswith("stopped after")
    code, _, err = finish(start(config))
    assert code == 0, err
    assert lasting_metrics(folder) == lasting_metrics(uninterrupted)
    assert (folder / "export/model.safetensors").read_bytes() == (
        uninterrupted / "export/model.safetensors"
    ).read_bytes()


def test_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(uninterrupted, killed_twice):
    whole, resumed = (folder / "export/model.safetensors" for folder in (uninterrupted, killed_twice))
    assert whole.read_bytes() == resumed.read_bytes()


def test_killed_and_resumed_records_every_step_once_with_the_same_figures(uninterrupted, killed_twice):
    expected = lasting_metrics(uninterrupted)
    assert [row["step"] for row in expected] == list(range(STEPS))
    assert {"loss", "grad_norm", "lr", "dpo/margin", "reward_margin", "logprob_gap"} <= expected[0].keys()
    assert lasting_metrics(killed_twice) == expected


def test_the_evaluation_during_a_run_is_the_same_after_a_kill(uninterrupted, killed_twice):
    for rows in (lasting_metrics(uninterrupted), lasting_metrics(killed_twice)):
        evaluated = {row["step"]: row for row in rows if any(name.startswith("evaluation/") for name in row)}
        assert list(evaluated) == [0, 2, 5]  # the start, after three steps, and the end
        assert evaluated[0]["evaluation/judge/quality"] == 0.5  # it ties with itself
        # Not the judge's quality: whether what this policy has learnt to write can be compared differs by machine.
        assert evaluated[5].keys() >= {"evaluation/repetition", "evaluation/length"}


def test_killed_and_resumed_samples_the_same_texts_with_the_same_verdicts(uninterrupted, killed_twice):
    expected = json_lines(uninterrupted / "samples.jsonl")
    assert [row["step"] for row in expected] == [step for step in range(STEPS) for _ in range(4)]
    assert {candidate["source"] for row in expected for candidate in row["candidates"]} == {"original", "rollout"}
    assert json_lines(killed_twice / "samples.jsonl") == expected


def test_killed_and_resumed_ends_with_the_same_state(uninterrupted, killed_twice):
    def last(folder):
        state = json.loads((folder / f"checkpoints/step-{STEPS:08d}/state.json").read_text())
        assert state["config"].pop("run.dir") == str(folder)
        return state

    assert last(killed_twice) == last(uninterrupted)
    assert checkpoints(killed_twice) == checkpoints(uninterrupted) == ["step-00000004", "step-00000006"]


def test_output_into_a_pipe_is_one_plain_line_per_step(uninterrupted):
    out = (uninterrupted.parent / "out.txt").read_text()
    assert "\x1b" not in out
    shown = [line.split("  ")[0] for line in out.splitlines() if line.startswith("step ")]
    assert shown == [f"step {step}/{STEPS}" for step in range(1, STEPS + 1)]


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_finished_run_called_again_says_so_and_changes_nothing(rlpt, uninterrupted):
    before = contents(uninterrupted)
    code, out, err = rlpt("train", "-c", uninterrupted.parent / "run.yaml")
    assert code == 0, err
    assert f"{uninterrupted} is complete (6 of 6 steps)" in out
    assert err == ""
    assert contents(uninterrupted) == before


@pytest.fixture(scope="module")
def finished(tiny_model, corpus, tmp_path_factory):
    """A finished run of next-token training without an engine, with two checkpoints."""
    base = tmp_path_factory.mktemp("finished")
    run_training(tiny_config(base / "run.yaml", tiny_model, corpus, base / "run", **NEXT_TOKEN))
    return base / "run"


@pytest.fixture
def resume(rlpt, finished, tmp_path):
    """Damage a copy of the finished run, then train in it; returns exit code, standard output and standard error."""

    def run(damage, *arguments):
        folder = shutil.copytree(finished, tmp_path / "run")
        damage(folder)
        return rlpt("train", "-c", finished.parent / "run.yaml", f"run.dir={folder}", *arguments)

    return run


def untouched(folder):
    assert (folder / "export").is_dir()


def incomplete(folder):
    shutil.rmtree(folder / "export")


def test_a_run_that_lacks_only_its_export_goes_on_from_its_last_checkpoint(resume, finished, tmp_path):
    code, _, err = resume(incomplete)
    assert code == 0, err
    export = "export/model.safetensors"
    assert (tmp_path / "run" / export).read_bytes() == (finished / export).read_bytes()


@pytest.mark.parametrize(
    ("change", "then", "now"), [("optimizer.lr=0.002", "0.001", "0.002"), ("run.seed=5", "1", "5")]
)
def test_a_changed_configuration_is_refused(resume, change, then, now):
    code, _, err = resume(untouched, change)
    assert code == CheckpointError.exit_code
    line = only_error(err)
    assert f"{change.split('=')[0]} = {then}, not {now}" in line
    assert "--fresh" in line


def test_what_does_not_change_the_learning_may_be_changed(resume):
    assert resume(untouched, "checkpoint.keep=1", "observe.samples_per_step=0")[0] == 0


def test_steps_without_a_checkpoint_are_not_silently_done_over(resume):
    code, _, err = resume(lambda folder: shutil.rmtree(folder / "checkpoints"))
    assert code == CheckpointError.exit_code
    assert "--fresh" in only_error(err)


def test_fresh_moves_the_old_run_aside_and_starts_anew(resume, finished, tmp_path):
    code, out, err = resume(untouched, "--fresh")
    assert code == 0, err
    assert f"moved {tmp_path}/run to {tmp_path}/run.old-1" in out
    old, before = (
        {path for path in contents(folder) if path.parts[0] != "lock"} for folder in (tmp_path / "run.old-1", finished)
    )
    assert old == before
    assert lasting_metrics(tmp_path / "run") == lasting_metrics(finished)


def remove_marker(folder):
    incomplete(folder)
    (folder / "checkpoints/step-00000002/COMPLETE").unlink()


def spoil_state(folder):
    incomplete(folder)
    (folder / "checkpoints/step-00000002/state.json").write_text('{"step": 2, ')


def shorten_weights(folder):
    incomplete(folder)
    for path in (folder / "checkpoints/step-00000002/policy").glob("*.distcp"):
        os.truncate(path, path.stat().st_size // 2)


def remove_weights(folder):
    incomplete(folder)
    shutil.rmtree(folder / "checkpoints/step-00000002/policy")


@pytest.mark.parametrize("damage", [remove_marker, spoil_state, shorten_weights, remove_weights])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_good(resume, rlpt, finished, tmp_path, damage):
    code, _, err = resume(damage)
    assert code == CheckpointError.exit_code, err
    line = only_error(err)
    assert "step-00000002" in line
    # Follow the advice in that line.
    advice = "checkpoint.allow_previous=true"
    assert advice in line
    code, _, err = rlpt("train", "-c", finished.parent / "run.yaml", f"run.dir={tmp_path / 'run'}", advice)
    assert code == 0, err
    assert lasting_metrics(tmp_path / "run") == lasting_metrics(finished)
