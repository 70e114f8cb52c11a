"""The staged code of a launch: complete and identifiable."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launch.code import stage
from launch.spec import Spec, read_secrets
from megatron_rlpt.errors import ConfigError

SPEC = Spec(run_dir="/r", config="job/config.yaml", components=("trainer",))


@pytest.fixture
def repository(tmp_path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    (root / "module.py").write_text("old\n")
    (root / ".gitignore").write_text("ignored\n")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def test_committed_code_is_copied_with_its_commit(repository, tmp_path):
    (repository / "ignored").write_text("large")
    stage(tmp_path / "staged", "a: 1\n", SPEC, pack_dirty=False, root=repository)
    job = tmp_path / "staged/job"
    commit = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert json.loads((job / "code.json").read_text()) == {"commit": commit.strip(), "uncommitted": []}
    assert (tmp_path / "staged/module.py").read_text() == "old\n"
    assert not (tmp_path / "staged/ignored").exists()
    assert (job / "config.yaml").read_text() == "a: 1\n"
    assert not (job / "uncommitted.patch").exists()


def test_uncommitted_changes_are_refused_by_name(repository, tmp_path):
    (repository / "module.py").write_text("new\n")
    with pytest.raises(ConfigError, match=r"1 files .* not committed \(module\.py\); commit them, or launch with"):
        stage(tmp_path / "staged", "", SPEC, pack_dirty=False, root=repository)
    assert not (tmp_path / "staged").exists()


def test_or_packed_new_files_too_and_recorded(repository, tmp_path):
    (repository / "module.py").write_text("new\n")
    (repository / "forgotten.py").write_text("x\n")
    stage(tmp_path / "staged", "", SPEC, pack_dirty=True, root=repository)
    assert (tmp_path / "staged/module.py").read_text() == "new\n"
    assert (tmp_path / "staged/forgotten.py").is_file()
    assert sorted(json.loads((tmp_path / "staged/job/code.json").read_text())["uncommitted"]) == [
        "forgotten.py",
        "module.py",
    ]
    assert "+new" in (tmp_path / "staged/job/uncommitted.patch").read_text()


def test_files_that_are_no_text_are_recorded_too(repository, tmp_path):
    (repository / "module.py").write_bytes(b"caf\xe9\n")
    stage(tmp_path / "staged", "", SPEC, pack_dirty=True, root=repository)
    assert b"+caf\xe9" in (tmp_path / "staged/job/uncommitted.patch").read_bytes()


def test_a_private_file_is_not_packed_by_accident(repository, tmp_path):
    (repository / "my-secrets").write_text("A=b\n")
    (repository / "my-secrets").chmod(0o600)
    with pytest.raises(ConfigError, match=r"my-secrets is private .* and not committed; move it"):
        stage(tmp_path / "staged", "", SPEC, pack_dirty=True, root=repository)


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="launch from a clone"):
        stage(tmp_path / "staged", "", SPEC, pack_dirty=False, root=tmp_path)


def test_secrets_come_out_of_a_private_file_only(tmp_path):
    file = tmp_path / "secrets"
    file.write_text("# mine\nWANDB_API_KEY=abc=d\n\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secrets(str(file))
    file.chmod(0o600)
    assert read_secrets(str(file)) == {"WANDB_API_KEY": "abc=d"}
    file.write_text("hunter2\n")
    with pytest.raises(ConfigError, match="line 1, is not of the form") as caught:
        read_secrets(str(file))
    assert "hunter2" not in str(caught.value)
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        read_secrets(str(file))
