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
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launch.spec import Spec
from megatron_rlpt.config import Config, SourceConfig
from megatron_rlpt.config.user_classes import SECOND_MEASURE
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.extensions import class_name, is_extension, load_extension

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


def with_staged_classes(config: Config, root: Path = ROOT) -> tuple[Config, dict[str, Path]]:
    """Have the user's classes read from the staged code.

    A single file is copied, wherever it lies; a module of the repository is staged with it; one that is installed
    has to be installed on the cluster as well.

    Args:
        config: the run.
        root: the repository.

    Returns:
        The configuration with the names of the copies, and name in the staged code -> file to copy.

    Raises:
        ConfigError: a class is in a package that is neither in the repository nor installed.
    """
    files: dict[str, Path] = {}

    def staged(key: str, name: str) -> str:
        if not is_extension(name):
            return name
        extension, module = load_extension(key, name), name.rpartition(":")[0]
        file = extension.file.resolve()
        installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")]
        if not module.endswith(".py"):
            if root.joinpath(*module.split(".")).with_suffix(".py") == file or any(map(file.is_relative_to, installed)):
                return name
            if "." in module:
                raise extension.problem(
                    f"which is in the package of {file}, outside of {root}; give it as one file (path/file.py:Class), "
                    "or install the package here and on the cluster"
                )
        copy = f"{JOB}/classes/{extension.sha256[:8]}/{file.name}"
        files[copy] = file
        return f"{copy}:{class_name(name)}"

    def sources(key: str, entries: list[SourceConfig]) -> list[SourceConfig]:
        return [
            replace(entry, reader=staged(f"{key}[{number}].reader", entry.reader))
            for number, entry in enumerate(entries)
        ]

    rewriter = config.teacher.rewriter
    found = replace(
        config,
        objective=replace(config.objective, name=staged("objective.name", config.objective.name)),
        teacher=replace(
            config.teacher,
            judge=staged("teacher.judge", config.teacher.judge),
            rewriter=replace(rewriter, name=staged("teacher.rewriter.name", rewriter.name)),
        ),
        data=replace(
            config.data,
            sources=sources("data.sources", config.data.sources),
            heldout=sources("data.heldout", config.data.heldout),
        ),
        evaluation=replace(
            config.evaluation,
            second_measure=staged(SECOND_MEASURE, config.evaluation.second_measure),
            second_corpus=sources("evaluation.second_corpus", config.evaluation.second_corpus),
            judges=[
                replace(one, judge=staged(f"evaluation.judges[{number}].judge", one.judge))
                for number, one in enumerate(config.evaluation.judges)
            ],
        ),
    )
    return found, files


def stage(
    target: Path,
    config: str,
    spec: Spec,
    *,
    pack_dirty: bool,
    root: Path = ROOT,
    classes: Mapping[str, Path] | None = None,
) -> None:
    """Copy the code to ``target`` and add configuration, spec and provenance.

    Args:
        target: folder, which must not exist.
        config: the resolved configuration as YAML.
        spec: settings for the components.
        pack_dirty: include uncommitted changes and record them as a patch; otherwise they are an error.
        root: the repository.
        classes: files of the user's classes, by their names in ``target`` (``with_staged_classes``).

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
    for name, source in (classes or {}).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target / name)
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
