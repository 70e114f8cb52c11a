"""The code that a launch runs: a copy of this repository as it is now, with the configuration beside it.

commit ──> files ──> staged/              what components run in
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
"""Folder of what belongs to this launch, inside the code."""
CONFIG, SPEC = f"{JOB}/config.yaml", f"{JOB}/spec.json"
_SHOWN = 5
_BYTES = "surrogateescape"
"""Names of files and their content need not be text."""


def interpreter() -> str:
    """The Python with the full installation that ``tools/setup.sh`` makes; else the one that runs this, if it has it.

    Raises:
        ConfigError: neither is there.
    """
    full = ROOT / ".venv/bin/python"
    if full.is_file():
        return str(full)
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"no interpreter with torch: {full} is not there; run tools/setup.sh, or name one in python of the cluster "
            "file"
        )
    return sys.executable


def stage(target: Path, config: str, spec: Spec, *, pack_dirty: bool, root: Path = ROOT) -> None:
    """Copy the code into ``target`` and write configuration, spec and provenance beside it.

    Args:
        target: folder that does not exist.
        config: the resolved configuration as YAML.
        spec: what components are told.
        pack_dirty: copy files as they are, uncommitted changes included, and keep these as a patch; else they are
            an error.
        root: the repository.

    Raises:
        ConfigError: not a git repository, or it has uncommitted changes that are not to be packed.
    """
    commit = _git(root, "rev-parse", "HEAD").strip()
    dirty = _git(root, "status", "--porcelain", "--untracked-files=normal").splitlines()
    if dirty and not pack_dirty:
        shown = ", ".join(line[3:] for line in dirty[:_SHOWN]) + (", ..." if len(dirty) > _SHOWN else "")
        raise ConfigError(
            f"{len(dirty)} files of {root} are not committed ({shown}); commit them, or launch with --pack-dirty, "
            "which copies and records them"
        )
    # Also what is new and not ignored: a module that is forgotten fails only on the cluster.
    untracked = set(_git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0"))
    tracked = set(_git(root, "ls-files", "-z", "--cached").split("\0"))
    for name in filter(None, tracked | untracked):
        source = root / name
        if name in untracked and source.is_file() and not source.stat().st_mode & 0o044:
            raise ConfigError(f"{source} is for its owner alone and not committed; move it out of {root}, or ignore it")
        if source.is_file():  # a deleted one is still in the index
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
        raise ConfigError("git is not installed; a launch records which code it runs") from None
    if done.returncode:
        raise ConfigError(
            f"{root} is no git repository ({done.stderr.decode(errors='replace').strip()}); launch from a clone"
        )
    return done.stdout.decode("utf-8", _BYTES)
