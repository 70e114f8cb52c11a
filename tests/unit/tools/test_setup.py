"""The set-up script's choices, with programs that stand in for Python, pip and uv and write down their arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PYTHON = """#!/bin/sh
echo "python $*" >> "$LOG"
case "$*" in
    *version_info*format*print* | *print*version_info*) echo {version} ;;
    *version_info*) test {version} = "$3" ;;
    *"import nvidia"*) echo {root}/nvidia ;;
    *transformer-engine-torch*sys.argv* | *"import torch"*) exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the script reads, with an environment whose programs only write down what they are asked."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("bench", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for header in ("cudnn/include/cudnn.h", "nccl/include/nccl.h"):
        (tmp_path / "nvidia" / header).parent.mkdir(parents=True)
        (tmp_path / "nvidia" / header).touch()
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name, text in (("pip", "#!/bin/sh\nexit 1\n"), ("uv", '#!/bin/sh\necho "uv $*" >> "$LOG"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def set_up(checkout, *arguments, version="3.12", **variables):
    """Run the script in an environment of Python ``version``; return the process and what was asked."""
    python, log = checkout / ".venv/bin/python", checkout / "log"
    python.write_text(PYTHON.format(version=version, root=checkout))
    python.chmod(0o755)
    environment = {**os.environ, "LOG": str(log), "RLPT_PYTHON": str(python), "CUDA_HOME": str(checkout), **variables}
    done = subprocess.run(
        ["bash", "tools/setup.sh", *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_the_gpu_stack_is_the_lock_and_transformer_engine_of_the_same_version(checkout):
    done, asked = set_up(checkout, "--gpu")
    assert done.returncode == 0, done.stderr
    (install,) = [line for line in asked if line.startswith("uv ")]
    assert "--no-deps" in install
    assert install.endswith("-r tools/gpu-lock.txt --editable .")
    lock = (ROOT / "tools/gpu-lock.txt").read_text().splitlines()
    version = next(line.split("==")[1] for line in lock if line.startswith("transformer-engine=="))
    assert asked[-1] == f"python -m pip install --no-build-isolation --no-deps transformer-engine-torch=={version}"
    assert set_up(checkout, "--gpu")[1] == asked, "an environment that matches the lock stays as it is"


def test_transformer_engine_can_be_left_out(checkout):
    done, asked = set_up(checkout, "--gpu", RLPT_TRANSFORMER_ENGINE="no")
    assert done.returncode == 0, done.stderr
    assert not [line for line in asked if "transformer-engine" in line]


def test_an_environment_of_the_other_python_is_named_and_kept(checkout):
    (checkout / ".venv/.installed").write_text("of the CPU stack")
    python = checkout / "python3.12"
    python.write_text(PYTHON.format(version="3.12", root=checkout))
    python.chmod(0o755)
    done, asked = set_up(checkout, "--gpu", version="3.11", RLPT_PYTHON=str(python))
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: .venv has Python 3.11, and tools/gpu-lock.txt needs 3.12; remove .venv and run this again\n"
    )
    assert not [line for line in asked if line.startswith("uv ")]
    assert (checkout / ".venv/.installed").exists()


def test_what_it_does_not_know_or_find_is_one_line(checkout):
    done, _ = set_up(checkout, "--cuda")
    assert (done.returncode, done.stderr) == (
        1, "error: unknown argument --cuda; usage: bash tools/setup.sh [--gpu]\n"
    )  # fmt: skip
    done, _ = set_up(checkout, "--gpu", RLPT_PYTHON="", PATH=_without_python(checkout))
    assert done.returncode == 1
    assert done.stderr == "error: no Python 3.12 found; install it or name one with RLPT_PYTHON=/path/to/python3.12\n"


def _without_python(checkout):
    """Return a PATH with the tools of the script and no interpreter."""
    folder = checkout / "path"
    folder.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "sed", "sha256sum", "uname"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)
