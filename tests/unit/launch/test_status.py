"""``rlpt status`` for the files that components and jobs left in the run folder."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from launch.status import show
from megatron_rlpt.errors import ConfigError


@pytest.fixture
def say(tmp_path):
    """Write the status of a component."""

    def write(name: str, start: str, state: str = "running", ago: float = 0.0) -> None:
        folder = tmp_path / "cluster/status"
        folder.mkdir(parents=True, exist_ok=True)
        moment = time.time() - ago
        said = {"component": name, "role": name.partition("-")[0], "state": state, "host": f"host-of-{start}", "pid": 7}
        said |= {"since": moment, "time": moment, "starts": 1, "log": str(tmp_path / f"{name}.log"), "start": start}
        (folder / f"{name}.json").write_text(json.dumps(said))

    return write


def queue(tmp_path: Path, **jobs: int) -> None:
    folder = tmp_path / "cluster/jobs"
    folder.mkdir(parents=True)
    for part, number in jobs.items():
        (folder / part).write_text(f"{number}\n")


def shown(tmp_path: Path) -> tuple[int, str]:
    text = io.StringIO()
    return show(tmp_path, 3, Console(file=text, width=200)), text.getvalue()


def test_a_folder_without_a_launch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no launched run"):
        show(tmp_path, 3)


def test_a_job_that_waits_in_the_queue_is_shown_before_anything_runs(tmp_path):
    queue(tmp_path, run=12)
    code, text = shown(tmp_path)
    assert code == 0
    assert "job 12: " in text
    assert "no component has started yet" in text


def test_both_jobs_of_a_run_are_shown_with_the_last_start_of_each(tmp_path, say):
    queue(tmp_path, judging=12, training=13)
    say("buffer-00000", "12.0", ago=1.0)
    say("judges-00000", "12.0", ago=1.0)
    say("trainer-00000", "13.1")
    say("trainer-00001", "13.0", ago=100.0)
    code, text = shown(tmp_path)
    assert code == 0
    assert "judging job 12: " in text
    assert "training job 13: " in text
    assert {"buffer-00000", "judges-00000", "trainer-00000"} <= set(text.split())
    assert "trainer-00001" not in text, "an earlier start had more ranks"


def test_components_of_an_earlier_launch_are_not(tmp_path, say):
    queue(tmp_path, run=20)
    say("trainer-00000", "20.0", ago=2.0)
    say("teacher-00000", "12.0")
    text = shown(tmp_path)[1]
    assert "trainer-00000" in text
    assert "teacher-00000" not in text


def test_on_one_machine_the_last_start_counts(tmp_path, say):
    say("trainer-00000", "b")
    say("judges-00000", "b", ago=1.0)
    say("teacher-00000", "a", ago=50.0)
    assert "teacher" not in shown(tmp_path)[1]


@pytest.mark.parametrize("field", ["since", "time", "pid", "state", "starts", "start"])
@pytest.mark.parametrize("value", [None, "x", [], -1, float("inf"), True, {"a": 1}])
def test_damaged_words_of_a_component_are_passed_over(tmp_path, say, field, value):
    say("judges-00000", "a")
    say("trainer-00000", "a")
    damaged = tmp_path / "cluster/status/judges-00000.json"
    damaged.write_text(json.dumps(json.loads(damaged.read_text()) | {field: value}))
    (tmp_path / "heartbeat.json").write_text(json.dumps({"time": value, "state": "running", "step": value}))
    code, text = shown(tmp_path)
    assert code == 0
    assert "trainer-00000" in text


def test_a_component_that_failed_or_is_silent_is_an_exit_code(tmp_path, say):
    say("trainer-00000", "a")
    assert shown(tmp_path)[0] == 0
    say("judges-00000", "a", ago=40.0)
    code, text = shown(tmp_path)
    assert code == 1
    assert "silent for 40 s" in text
    say("judges-00000", "a", state="failed with exit code 5")
    assert shown(tmp_path)[0] == 1
