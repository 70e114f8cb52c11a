"""The Slurm sandbox: bad folders are refused, nothing is left behind, and other processes are unharmed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from sandbox_script import call

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).resolve().parents[2] / "tools/sandbox/slurm.py"
sandbox = partial(call, SCRIPT)


@pytest.fixture
def daemons(monkeypatch):
    """What the sandboxes share. Their folder is kept off the path: Redis's sandbox there is called as its client."""
    module = load(SCRIPT.with_name("daemons.py"))
    monkeypatch.setitem(sys.modules, "daemons", module)
    return module


@pytest.fixture
def accounting(daemons, monkeypatch):
    module = load(SCRIPT.with_name("accounting.py"))
    monkeypatch.setitem(sys.modules, "accounting", module)
    return module


@pytest.fixture
def module(accounting):
    return load(SCRIPT)


def load(script: Path):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder():
    """A folder with a path short enough for sockets, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    yield folder
    shutil.rmtree(folder)


def test_stop_ends_the_jobs_and_the_daemons(module, daemons, folder):
    code, out, err = sandbox("start", folder)
    assert code == 0, err
    assert out == f"export SLURM_CONF={folder}/slurm.conf\n"
    try:
        started = daemons.read_processes(folder)
        assert set(started) == {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd-n1", "slurmd-n2"}
        code, _, err = sandbox("start", folder)
        assert (code, err.startswith(f"error: {folder} is running already")) == (1, True)
        number = folder / "job-process"
        script = folder / "job.sh"
        script.write_text(f"#!/bin/bash\necho $$ > {number}.new\nmv {number}.new {number}\nexec sleep 600\n")
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        subprocess.run(["sbatch", "--output=/dev/null", script], env=environment, check=True, capture_output=True)
        module.wait_for(folder, "job", number.is_file)
        job = int(number.read_text())
        assert daemons.start_time(job)
    finally:
        code, _, err = sandbox("stop", folder)
    assert code == 0, err
    assert not daemons.start_time(job)
    assert not any(daemons.is_running(*daemon) for daemon in started.values())


def test_what_was_killed_starts_again_in_the_same_folder(daemons, folder):
    for _ in range(2):
        code, _, err = sandbox("start", folder)
        assert code == 0, err
        for daemon in daemons.read_processes(folder).values():
            os.kill(daemon[0], signal.SIGKILL)
        assert sandbox("stop", folder) == (0, "", "")


def test_a_process_that_got_the_number_of_a_daemon_is_left_alone(folder):
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            (folder / "slurm.conf").touch()
            (folder / "processes.json").write_text(json.dumps({"munged": (other.pid, "1")}))
            assert sandbox("stop", folder) == (0, "", "")
            assert other.poll() is None
        finally:
            other.kill()


def test_a_daemon_that_does_not_start_is_named_and_the_others_are_ended(module, daemons, folder, monkeypatch, tmp_path):
    slurmd = tmp_path / "slurmd"
    slurmd.write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
    slurmd.chmod(0o755)
    monkeypatch.setattr(daemons, "SEARCH_PATH", f"{tmp_path}:{daemons.SEARCH_PATH}")
    started = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda *a, **b: (launch(*a, **b), started.append(module.read_processes(folder)))
    )
    with pytest.raises(module.SandboxError, match="slurmd-n1 ended at its start: not today"):
        module.start(folder)
    assert {"munged", "mariadbd", "slurmdbd", "slurmctld"} <= set(started[-1])
    assert not any(module.is_running(*process) for process in started[-1].values())


def test_temporary_tables_of_another_database_are_left_alone(accounting, folder):
    """MariaDB clears its temporary folder when it starts; a shared one broke databases that started side by side."""
    (folder / "log").mkdir()
    with tempfile.NamedTemporaryFile(prefix="#sql-temptable-") as table:
        accounting.create_database(folder)
        assert Path(table.name).is_file()


def test_an_error_of_the_database_is_quoted(accounting, daemons, folder, monkeypatch, tmp_path):
    program = tmp_path / "mariadb-install-db"
    program.write_text("#!/bin/sh\necho Installing\necho 'ERROR: 28 No space left'\necho Read the manual\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(daemons, "SEARCH_PATH", f"{tmp_path}:{daemons.SEARCH_PATH}")
    (folder / "log").mkdir()
    with pytest.raises(daemons.SandboxError, match="failed with 1: ERROR: 28 No space left"):
        accounting.create_database(folder)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "somebody's").touch()
    for command, folder, message in (
        ("start", tmp_path, "is not empty and no sandbox; name a new folder"),
        ("start", tmp_path / ("long" * 30), "is too long a path for a Unix socket"),
        ("start", tmp_path / "two words", "has a space or one of"),
        ("stop", tmp_path, "holds no sandbox"),
    ):
        code, _, err = sandbox(command, folder)
        assert code == 1
        assert err.startswith("error: ")
        assert message in err
        assert len(err.splitlines()) == 1


def test_without_slurm_the_error_says_how_to_install_it(module, daemons, folder, monkeypatch):
    monkeypatch.setattr(daemons, "SEARCH_PATH", "/nonexistent")
    with pytest.raises(module.SandboxError, match=r"not installed here \(munged, .* run as root: .* install$"):
        module.start(folder)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(module.SandboxError, match=r"run as root: apt-get install slurm-wlm munge slurmdbd"):
        module.install()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(module.SandboxError, match="there is no apt-get"):
        module.install()
