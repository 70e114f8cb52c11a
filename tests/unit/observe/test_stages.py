"""Stage seconds and the trace: true also after an exception or a kill."""

import json
import threading
import time

import pytest

from megatron_rlpt.observe import StageTimer


def spans(path):
    """The trace as Perfetto reads it: an array without its closing bracket."""
    text = path.read_text()
    assert text.startswith("[\n")
    events = json.loads(text.rstrip().rstrip(",") + "]")
    return [event for event in events if event["ph"] == "X"]


def test_seconds_per_stage_and_step(tmp_path):
    timer = StageTimer(None)
    with timer.stage("rollout"):
        time.sleep(0.02)
    with timer.stage("rollout"):
        time.sleep(0.02)
    with timer.stage("update"):
        pass
    seconds = timer.end_step()
    assert list(seconds) == ["rollout", "update"]
    assert 0.04 <= seconds["rollout"] < 1
    assert timer.end_step() == {}


def test_running_stage_is_known_and_announced():
    seen = []
    timer = StageTimer(None, on_stage=seen.append)
    assert timer.current is None
    with timer.stage("rollout"), timer.stage("sync"):
        assert timer.current == "sync"
    assert timer.current is None
    assert seen == ["rollout", "sync"]


def test_work_in_the_background_is_timed_apart_from_the_stages_it_goes_on_beside(tmp_path):
    path = tmp_path / "trace.jsonl"
    timer = StageTimer(path)

    def generate() -> None:
        with timer.background("generate"):
            time.sleep(0.02)

    with timer.stage("update"):
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        assert timer.current == "update"
    assert list(timer.end_step()) == ["update"]
    assert 0.02 <= timer.end_background()["generate"] < 1
    assert timer.end_background() == {}
    timer.close()
    beside, stage = spans(path)
    assert (beside["name"], stage["name"]) == ("generate", "update")
    assert beside["tid"] != stage["tid"], "a track of its own"


def test_a_stage_that_fails_is_timed_and_closed(tmp_path):
    path = tmp_path / "run" / "trace.jsonl"
    with pytest.raises(RuntimeError), StageTimer(path) as timer, timer.stage("judge"):
        raise RuntimeError
    assert timer.current is None
    assert [span["name"] for span in spans(path)] == ["judge"]


def test_spans_carry_step_time_and_length(tmp_path):
    path = tmp_path / "trace.jsonl"
    before = time.time()
    with StageTimer(path, start=7) as timer:
        with timer.stage("step"), timer.stage("rollout"):
            time.sleep(0.01)
        timer.end_step()
        with timer.stage("update"):
            pass
    inner, outer, later = spans(path)
    assert [span["args"]["step"] for span in (inner, outer, later)] == [7, 7, 8]
    assert 10_000 <= inner["dur"] < 1_000_000
    assert before - 1 < inner["ts"] / 1e6 < time.time() + 1
    # Spans on one thread must nest, or Perfetto drops them.
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.2
    assert later["ts"] >= outer["ts"] + outer["dur"] - 0.2


def test_trace_stays_readable_after_a_kill_and_a_resume(tmp_path):
    path = tmp_path / "trace.jsonl"
    killed = StageTimer(path)
    with killed.stage("rollout"):
        pass
    with path.open("a") as file:
        file.write('{"name": "upd')
    with StageTimer(path) as timer, timer.stage("judge"):
        pass
    assert [span["name"] for span in spans(path)] == ["rollout", "judge"]
