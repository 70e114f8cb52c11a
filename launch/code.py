"""Staging of the code that a launch runs: a copy of this repository, together with the configuration.

commit ──> files ──> staged/              working directory of all components
                      ├── megatron_rlpt/ launch/ ...
                      └── job/  config.yaml  spec.json  code.json  uncommitted.patch
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

from launch.spec import Spec
from megatron_rlpt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
JOB = "job"
"""Folder for the files of this launch, inside the code."""
CONFIG, SPEC = f"{JOB}/config.yaml", f"{JOB}/spec.json"
_SHOWN = 5
_BYTES = "surrogateescape"
"""File names and contents need not be UTF-8."""


def interpreter() -> str:
    """Return the interpreter of ``.venv``, or the running one if it has torch.

    Raises:
        ConfigError: neither exists.
    """
    full = ROOT / ".venv/bin/python"
    if full.is_file():
        return str(full)
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"no interpreter with torch: {full} does not exist; run tools/setup.sh, or set python in the cluster file"
        )
    return sys.executable


def stage(target: Path, config: str, spec: Spec, *, pack_dirty: bool, root: Path = ROOT) -> None:
    """Copy the code to ``target`` and add configuration, spec and provenance.

    Args:
        target: folder, which must not exist.
        config: the resolved configuration as YAML.
        spec: settings for the components.
        pack_dirty: include uncommitted changes and record them as a patch; otherwise they are an error.
        root: the repository.

    Raises:
        ConfigError: not a git repository, or it has uncommitted changes without ``pack_dirty``.
    """
    commit = _git(root, "rev-parse", "HEAD").strip()
    dirty = _git(root, "status", "--porcelain", "--untracked-files=normal").splitlines()
    if dirty and not pack_dirty:
        shown = ", ".join(line[3:] for line in dirty[:_SHOWN]) + (", ..." if len(dirty) > _SHOWN else "")
        raise ConfigError(
            f"{len(dirty)} files of {root} are not committed ({shown}); commit them, or launch with --pack-dirty, "
            "which copies and records them"
        )
    # Include new files: a module that was never added would fail only on the cluster.
    untracked = set(_git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0"))
    tracked = set(_git(root, "ls-files", "-z", "--cached").split("\0"))
    for name in filter(None, tracked | untracked):
        source = root / name
        if name in untracked and source.is_file() and not source.stat().st_mode & 0o044:
            raise ConfigError(
                f"{source} is private (mode 0600) and not committed; move it out of {root} or add it to .gitignore"
            )
        if source.is_file():  # the index still lists a deleted file
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    job = target / JOB
    job.mkdir(parents=True)
    (target / CONFIG).write_text(config, encoding="utf-8")
    spec.write(target / SPEC)
    (job / "code.json").write_text(json.dumps({"commit": commit, "uncommitted": [line[3:] for line in dirty]}) + "\n")
    if dirty:
        (job / "uncommitted.patch").write_text(_git(root, "diff", "--binary", "HEAD"), encoding="utf-8", errors=_BYTES)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except FileNotFoundError:
        raise ConfigError("git is not installed, and a launch records the commit that it runs; install git") from None
    if done.returncode:
        raise ConfigError(
            f"{root} is not a git repository ({done.stderr.decode(errors='replace').strip()}); launch from a clone"
        )
    return done.stdout.decode("utf-8", _BYTES)
