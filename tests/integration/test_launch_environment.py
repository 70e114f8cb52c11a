"""The launch environment (tools/setup_launch.sh) suits a login node."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-launch/bin"


def test_the_commands_of_a_login_node_need_no_torch():
    assert (ENVIRONMENT / "python").is_file(), "run tools/setup_launch.sh first (tools/test.sh does)"
    assert subprocess.run([ENVIRONMENT / "python", "-c", "import torch"], capture_output=True).returncode != 0
    for arguments in (["--help"], ["config", "-c", "configs/demo.yaml"], ["launch", "--help"]):
        done = subprocess.run([ENVIRONMENT / "rlpt", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout
