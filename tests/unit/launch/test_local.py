"""All components on one machine: leftovers of an earlier start, and GPUs shared by trainer and servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from launch.local import _commands, _kill_commands, clear_earlier
from launch.spec import ServerSpec, Spec, publish
from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.distributed.processes import start_child
from megatron_rlpt.errors import ConfigError


@pytest.fixture
def spec(tmp_path) -> Spec:
    return Spec(run_dir=str(tmp_path / "run"), config="x", components=("teacher", "judges", "trainer"))


def test_what_an_earlier_start_left_behind_is_removed(spec, tmp_path):
    shared = tmp_path / "run/cluster"
    (shared / "failed").mkdir(parents=True)
    for name in ("failed/trainer-00000", "done", "stopped", "buffer.json", "outcome.json", "../stop"):
        (shared / name).write_text("{}")
    (shared / "password").write_text("kept")
    clear_earlier(spec)
    assert [path.name for path in shared.iterdir()] == ["password"]
    assert not (tmp_path / "run/stop").exists()


def test_a_run_that_is_being_run_is_not_started_a_second_time(spec):
    clear_earlier(spec)
    code = (
        "import time; from megatron_rlpt.distributed.holder import Holder\n"
        "print(Holder.me(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        held = {"holder": other.stdout.readline().strip()}
        publish(spec.shared / "local.json", held)
        with pytest.raises(ConfigError, match=rf"is in use by process {other.pid} on .*; end it first"):
            clear_earlier(spec)
        other.kill()
    clear_earlier(spec)  # that process has ended


def test_a_process_that_got_the_number_of_one_that_is_gone_holds_nothing(spec):
    clear_earlier(spec)
    publish(spec.shared / "local.json", {"holder": str(replace(Holder.me(), started="1"))})
    clear_earlier(spec)


def test_a_run_on_another_machine_is_not_started_here_while_its_components_are_heard_of(spec):
    clear_earlier(spec)
    publish(spec.shared / "local.json", {"holder": str(replace(Holder.me(), machine="another", host="node17"))})
    publish(spec.shared / "status/trainer-00000.json", {"time": time.time() - 1})
    with pytest.raises(ConfigError, match=r"is in use by process \d+ on node17"):
        clear_earlier(spec)
    publish(spec.shared / "status/trainer-00000.json", {"time": time.time() - 1000})
    clear_earlier(spec)


@pytest.mark.parametrize("holder", ["x", None, -1, {"pid": 7}, '{"pid": -1}', "[" * 100_000])
def test_a_damaged_holder_is_none(spec, holder):
    clear_earlier(spec)
    publish(spec.shared / "local.json", {"holder": holder})
    clear_earlier(spec)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir .*/file/run cannot be written: Not a directory"):
        clear_earlier(Spec(run_dir=str(tmp_path / "file/run"), config="x", components=("trainer",)))


def visible(spec: Spec) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for role, _, variables in _commands(spec, spec.shared, "start"):
        found.setdefault(role, set()).add(variables.get("CUDA_VISIBLE_DEVICES"))
    return found


def test_trainer_and_servers_have_gpus_of_their_own(spec, monkeypatch):
    servers = {"teacher": ServerSpec(per_node=2, gpus=1)}
    spec = replace(spec, trainer_gpus=2, ranks_per_node=2, servers=servers)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(spec) == {"teacher": {"2,3"}, "judges": {None}, "trainer": {"0,1"}}
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,7,9")
    assert visible(spec) == {"teacher": {"7,9"}, "judges": {None}, "trainer": {"GPU-a,GPU-b"}}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    roles = ("teacher", "rewriter", "judges", "trainer")
    two = replace(spec, components=roles, servers=servers | {"rewriter": ServerSpec(per_node=1, gpus=4)})
    assert visible(two) == {"teacher": {"2,3"}, "rewriter": {"4,5,6,7"}, "judges": {None}, "trainer": {"0,1"}}


def test_where_no_gpus_are_asked_for_nothing_is_said_of_them(spec):
    assert visible(spec) == {"teacher": {None}, "judges": {None}, "trainer": {None}}


def test_in_a_hurry_a_trainer_that_finishes_its_step_is_ended_but_none_of_another_start(spec):
    busy = ["bash", "-c", "trap '' TERM; echo; sleep 600; true"]
    mine, other = (start_child(busy, stdout=subprocess.PIPE) for _ in range(2))
    try:
        for name, process in (("mine", mine), ("other", other)):
            process.stdout.readline()
            said = {"start": name, "state": "running", "pid": process.pid}
            publish(spec.shared / f"status/trainer-{name}.json", said)
        _kill_commands(spec, "mine")
        assert mine.wait(60) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (mine, other):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
