"""A component watches its command: starts it again or not, passes on how it ended, and leaves its last words."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.component import ROLES, Component, Task, run_component
from launch.spec import Spec

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def handlers():
    """A component takes SIGTERM and SIGINT for itself; here they are the test runner's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def component(tmp_path) -> Component:
    spec = Spec(run_dir=str(tmp_path), config="job/config.yaml", components=("trainer",), environment={"WHO": "me"})
    return Component(spec, Task("judges", 0, 0, "7.0"))


def status(tmp_path) -> dict:
    return json.loads((tmp_path / "cluster/status/judges-00000.json").read_text())


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("exit 0", 0)])
def test_how_a_command_ended_is_how_the_component_ends(component, command, code):
    assert component.run(["bash", "-c", command], again=False) == code


def test_a_command_that_is_to_go_on_is_started_again_until_told_to_stop(component, tmp_path):
    script = f"echo start >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) -gt 1 ] && exec sleep 60; exit 3"
    codes = []
    thread = threading.Thread(target=lambda: codes.append(component.run(["bash", "-c", script], again=True)))
    thread.start()
    deadline = time.monotonic() + 60
    while status_of(tmp_path).get("starts") != 2 or status_of(tmp_path)["state"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = status(tmp_path)["pid"]
    component.stopped.set()
    thread.join(60)
    assert codes == [0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def status_of(tmp_path) -> dict:
    return status(tmp_path) if (tmp_path / "cluster/status/judges-00000.json").exists() else {}


def test_its_last_words_are_where_the_job_repeats_them(component, tmp_path, capsys):
    code = component.run(["bash", "-c", "seq 100; echo error: $WHO; exit 5"], again=False)
    component.failed(code)
    words = (tmp_path / "cluster/failed/judges-00000").read_text()
    assert "failed with exit code 5" in words
    assert words.rstrip().endswith("100\nerror: me")
    assert "\n50\n" not in words, "the end of the log, not all of it"
    assert words.strip() in capsys.readouterr().out
    assert status(tmp_path)["state"] == "failed with exit code 5"


def test_an_error_before_the_command_is_one_line_and_its_exit_code(tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("A=b\n")
    secrets.chmod(0o644)
    spec = Spec(run_dir=str(tmp_path), config="x", components=("trainer",), secrets_file=str(secrets))
    spec.write(tmp_path / "spec.json")
    done = subprocess.run(
        [sys.executable, "-m", "launch.component", "trainer", str(tmp_path / "spec.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "chmod 600" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_buffer_s_password_is_on_no_command_line_and_for_its_owner_alone(tmp_path):
    spec = Spec(run_dir=str(tmp_path), config="x", components=("buffer", "trainer"))
    spec.write(tmp_path / "spec.json")
    command = [sys.executable, "-m", "launch.component", "buffer", str(tmp_path / "spec.json")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            beat = tmp_path / "cluster/status/buffer-00000.json"
            while not beat.exists() or not (pid := json.loads(beat.read_text())["pid"]):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            password = (tmp_path / "cluster/password").read_text()
            assert len(password) == 64
            assert password not in Path(f"/proc/{pid}/cmdline").read_text()
            for file in ("password", "redis/redis.conf"):
                assert stat.S_IMODE((tmp_path / "cluster" / file).stat().st_mode) == 0o600
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def leave(tmp_path, part: str, code: int) -> None:
    """The other job has ended."""
    for folder, name, value in (("jobs", part, 12), ("ended", "12", code)):
        (tmp_path / "cluster" / folder).mkdir(parents=True)
        (tmp_path / "cluster" / folder / name).write_text(f"{value}\n")


def test_components_of_the_judging_job_end_well_once_training_has_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(ROLES, "judges", lambda this: this.run(["sleep", "60"], again=True))
    leave(tmp_path, "training", 7)
    spec = Spec(run_dir=str(tmp_path), config="x", components=("judges", "trainer"), separate=True)
    monkeypatch.setattr("launch.component._BEAT", 0.05)
    assert run_component("judges", spec) == 0
    assert not (tmp_path / "cluster/failed").exists()


@pytest.mark.parametrize(("code", "expected"), [(5, 5), (0, 6)])
def test_a_trainer_without_a_judging_job_stops_in_order_and_says_why(tmp_path, monkeypatch, capsys, code, expected):
    """It is asked as it always is, and given the time that it needs."""
    stops = f"while [ ! -e {tmp_path}/stop ]; do sleep 0.05; done; rm {tmp_path}/stop; exit 75"
    monkeypatch.setitem(ROLES, "trainer", lambda this: this.run(["bash", "-c", stops], again=False))
    monkeypatch.setattr("launch.component._BEAT", 0.05)
    leave(tmp_path, "judging", code)
    spec = Spec(run_dir=str(tmp_path), config="x", components=("judges", "trainer"), separate=True)
    assert run_component("trainer", spec) == expected
    assert f"the judging job has ended with exit code {code}" in capsys.readouterr().out


def test_a_trainer_that_is_done_has_not_failed_because_judging_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(ROLES, "trainer", lambda this: this.run(["sleep", "0.5"], again=False))
    monkeypatch.setattr("launch.component._BEAT", 0.05)
    leave(tmp_path, "judging", 0)
    spec = Spec(run_dir=str(tmp_path), config="x", components=("judges", "trainer"), separate=True)
    assert run_component("trainer", spec) == 0
