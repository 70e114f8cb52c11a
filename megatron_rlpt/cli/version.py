"""Version and commit of the running code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from megatron_rlpt import __version__

_ROOT = Path(__file__).resolve().parents[2]
_STAGED = "job/code.json"
"""Written by ``rlpt launch`` into its copy of the code, which has no .git."""
_SHORT = 12


def describe_version(root: Path = _ROOT) -> str:
    """Return the version and, in a checkout or the staged code of a launch, the commit."""
    commit = _from_git(root) or _from_stage(root)
    return f"rlpt {__version__} (commit {commit})" if commit else f"rlpt {__version__}"


def _from_git(root: Path) -> str:
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", f"--abbrev={_SHORT}", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _from_stage(root: Path) -> str:
    try:
        code = json.loads((root / _STAGED).read_text(encoding="utf-8"))
        return str(code["commit"])[:_SHORT] + ("-dirty" if code["uncommitted"] else "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""
