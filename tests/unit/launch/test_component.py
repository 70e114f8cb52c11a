"""A component supervises its command: restarts it or not, forwards its exit code, and reports the end of its log."""

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

from launch.component import ROLES, RunningComponent, Task, run_component
from launch.gate import await_judgment
from launch.spec import ServerSpec, Spec
from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import EndpointConfig, Role, load_config
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.judge_workers.discovery import KIND, announcement

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def handlers():
    """Restore the signal handlers of the test runner, because a component replaces those of SIGTERM and SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def component(tmp_path) -> RunningComponent:
    spec = Spec(run_dir=str(tmp_path), config="job/config.yaml", components=("trainer",), environment={"WHO": "me"})
    return RunningComponent(spec, Task("judges", 0, 0, "7.0"))


def status(tmp_path) -> dict:
    return json.loads((tmp_path / "cluster/status/judges-00000.json").read_text())


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("exit 0", 0)])
def test_how_a_command_ended_is_how_the_component_ends(component, command, code):
    assert component.run(["bash", "-c", command], service=False) == code


def test_a_command_that_is_to_go_on_is_started_again_until_told_to_stop(component, tmp_path):
    script = f"echo start >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) -gt 1 ] && exec sleep 60; exit 3"
    codes = []
    thread = threading.Thread(target=lambda: codes.append(component.run(["bash", "-c", script], service=True)))
    thread.start()
    deadline = time.monotonic() + 60
    while status_of(tmp_path).get("starts") != 2 or status_of(tmp_path)["state"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = status(tmp_path)["pid"]
    component.ending.set()
    thread.join(60)
    assert codes == [0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def status_of(tmp_path) -> dict:
    return status(tmp_path) if (tmp_path / "cluster/status/judges-00000.json").exists() else {}


def test_its_last_words_are_where_the_job_repeats_them(component, tmp_path, capsys):
    code = component.run(["bash", "-c", "seq 100; echo error: $WHO; exit 5"], service=False)
    component.fail(code)
    words = (tmp_path / "cluster/failed/judges-00000").read_text()
    assert "failed with exit code 5" in words
    assert words.rstrip().endswith("100\nerror: me")
    assert "\n50\n" not in words, "the end of the log, not all of it"
    assert words.strip() in capsys.readouterr().out
    assert status(tmp_path)["state"] == "failed with exit code 5"
    component.fail(1)
    assert (tmp_path / "cluster/jobs/run.exit_code").read_text() == "5", "that of the first"


def test_its_last_words_hold_no_escapes(component, tmp_path, capsys):
    component.fail(component.run(["bash", "-c", r"printf 'one\n\033]0;title\007two\n'; exit 5"], service=False))
    for words in ((tmp_path / "cluster/failed/judges-00000").read_text(), capsys.readouterr().out):
        assert words.rstrip().endswith("one\n\\x1b]0;title\\x07two")


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
    monkeypatch.setitem(ROLES, "judges", lambda this: this.run(["sleep", "60"], service=True))
    leave(tmp_path, "training", 7)
    spec = Spec(run_dir=str(tmp_path), config="x", components=("judges", "trainer"), separate=True)
    monkeypatch.setattr("launch.component._BEAT", 0.05)
    assert run_component("judges", spec) == 0
    assert not (tmp_path / "cluster/failed").exists()


@pytest.mark.parametrize(("code", "expected"), [(5, 5), (0, 6)])
def test_a_trainer_without_a_judging_job_stops_in_order_and_says_why(tmp_path, monkeypatch, capsys, code, expected):
    """It gets the usual stop request and the time that it needs."""
    stops = f"while [ ! -e {tmp_path}/stop ]; do sleep 0.05; done; rm {tmp_path}/stop; exit 75"
    monkeypatch.setitem(ROLES, "trainer", lambda this: this.run(["bash", "-c", stops], service=False))
    monkeypatch.setattr("launch.component._BEAT", 0.05)
    leave(tmp_path, "judging", code)
    spec = Spec(run_dir=str(tmp_path), config="x", components=("judges", "trainer"), separate=True)
    assert run_component("trainer", spec) == expected
    assert f"the judging job ended with exit code {code}" in capsys.readouterr().out


def test_a_trainer_that_is_done_has_not_failed_because_judging_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(ROLES, "trainer", lambda this: this.run(["sleep", "0.5"], service=False))
    monkeypatch.setattr("launch.component._BEAT", 0.05)
    leave(tmp_path, "judging", 0)
    spec = Spec(run_dir=str(tmp_path), config="x", components=("judges", "trainer"), separate=True)
    assert run_component("trainer", spec) == 0


def start_of(tmp_path, role: str, command: str) -> subprocess.Popen[bytes]:
    """Start a component with command ``command`` in a separate process."""
    program = (
        "import sys; from launch import component; from launch.spec import Spec; "
        # A trainer that takes longer than this to finish its step must not count as ended.
        "component._BEAT, component.SILENT = 0.3, 1.5; "
        f"component.ROLES['{role}'] = lambda this: this.run(['bash', '-c', {command!r}], service={role != 'trainer'}); "
        f"sys.exit(component.run_component('{role}', Spec(run_dir={str(tmp_path)!r}, config='x', components=())))"
    )
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"RLPT_START": "7.0"})


def wait_for(found) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_told_to_end_all_at_once_the_trainer_goes_first_and_has_the_time_that_it_needs(tmp_path):
    """As when a scheduler signals every process of a job: the last step needs judges and buffer."""
    trainer = f"while [ ! -e {tmp_path}/stop ]; do sleep 0.05; done; sleep 3; [ -e {tmp_path}/judging ] && exit 75"
    judges = f"touch {tmp_path}/judging; trap 'rm {tmp_path}/judging; exit' TERM; while :; do sleep 0.05; done"
    with start_of(tmp_path, "judges", judges) as judging, start_of(tmp_path, "trainer", trainer) as training:
        folder = tmp_path / "cluster/status"
        said = [folder / "judges-00000.json", folder / "trainer-00000.json"]
        wait_for(lambda: all(path.exists() and '"running"' in path.read_text() for path in said))
        wait_for((tmp_path / "judging").exists)
        for process in (judging, training):
            process.send_signal(signal.SIGUSR1)
        assert training.wait(60) == 0, "srun would end its other ranks otherwise"
        assert judging.wait(60) == 0
    assert (tmp_path / "cluster/stopped").read_text() == "7.0"
    assert not (tmp_path / "cluster/done").exists()
    assert not (tmp_path / "cluster/failed").exists()
    assert not (tmp_path / "judging").exists()


def test_a_status_that_cannot_be_written_does_not_end_the_command(tmp_path, component, capsys):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/status").write_text("in the way")
    assert component.run(["bash", "-c", "exit 0"], service=False) == 0
    assert "cannot write its status" in capsys.readouterr().err


def test_a_program_that_is_not_there_is_one_line(component):
    with pytest.raises(ConfigError, match="nowhere-server cannot be started on this node: No such file"):
        component.run(["nowhere-server"], service=True)


def test_a_trainer_that_waits_for_judges_stops_at_once_when_asked(tmp_path, monkeypatch):
    patient = tmp_path / "judge-try"
    patient.write_text("#!/bin/sh\nexec sleep 600\n")
    patient.chmod(0o755)
    monkeypatch.setattr("launch.gate.sys.executable", str(patient))
    (tmp_path / "stop").touch()
    spec = Spec(run_dir=str(tmp_path), config="x", components=("judges", "trainer"))
    assert run_component("trainer", spec) == 0
    assert (tmp_path / "cluster/stopped").exists()
    assert not (tmp_path / "cluster/failed").exists(), "which is no failure"


def test_a_trainer_waits_for_a_server_of_each_of_two_models(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    sections = {
        "run": {"dir": str(tmp_path)},
        "model": {"path": "m"},
        "data": {"sources": [{"path": "c.jsonl"}]},
        "train": {"steps": 1},
        "candidates": {"rewrite": True},
        "teacher": {"judge": "generative", "run_in": "workers", "rewriter": {"path": "w"}},
    }
    config.write_text(json.dumps(sections))
    buffer = open_buffer(load_config(config))
    buffer.announce(KIND, "j", announcement(EndpointConfig("http://j/v1"), [Role.judge]), 600.0)
    monkeypatch.setattr("launch.gate.sys.executable", "true")  # the trial judgment succeeds
    said: list[str] = []

    class Component:
        spec = Spec(run_dir=str(tmp_path), config=str(config), components=("judges", "trainer"))
        environment = dict(os.environ)

        def report(self, state: str) -> None:
            said.append(state)
            buffer.announce(KIND, "r", announcement(EndpointConfig("http://r/v1"), [Role.rewriter]), 600.0)

        def must_end(self) -> bool:
            return False

        def sleep(self, seconds: float) -> None:
            time.sleep(0.01)

    await_judgment(Component(), (), True, "7.0")
    assert said == ["waiting: no server of the rewriter is announced"]
    assert json.loads((tmp_path / "cluster/judged.json").read_text()) == {"start": "7.0"}
    buffer.close()


@pytest.mark.parametrize(("role", "model_role"), [("teacher", ""), ("teacher", "judge"), ("rewriter", "rewriter")])
def test_servers_serve_the_model_of_their_role(tmp_path, monkeypatch, role, model_role):
    server = ServerSpec(concurrency=5, arguments=("--seed", "3"), model_role=model_role)
    spec = Spec(run_dir=str(tmp_path), config="x", components=(role, "trainer"), servers={role: server})
    one = RunningComponent(spec, Task(role, 0, 0, "7.0"))
    started: list[list[str]] = []
    monkeypatch.setattr(one, "run", lambda command, **_: started.append(command) or 0)
    assert ROLES[role](one) == 0
    (command,) = started
    chosen = [command[command.index("--role") + 1]] if "--role" in command else []
    assert chosen == ([model_role] if model_role else [])
    assert command[command.index("--concurrency") + 1] == "5"
    assert command[-2:] == ["--seed", "3"]
