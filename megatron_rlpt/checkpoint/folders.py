"""The checkpoint folder: names, publishing by rename, retention, free space. Only the main rank changes it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.files import flush, free_name
from megatron_rlpt.observe import get_logger

_log = get_logger(__name__)
_PUBLISHED = re.compile(r"step-\d{8,}")
_UNFINISHED = re.compile(_PUBLISHED.pattern + r"(\.old)?\.partial")
"""Names that only this module gives. All other entries of the folder belong to the user."""
_HEADROOM = 1.1
"""Free space that a new checkpoint needs, relative to the size of the last one."""


def name_of(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_of(final: Path) -> int:
    """Return the number of steps behind the published checkpoint ``final``."""
    return int(final.name.removeprefix("step-"))


def partial_of(final: Path) -> Path:
    """Return the folder in which checkpoint ``final`` is written before it is published."""
    return final.with_name(final.name + ".partial")


def published(folder: Path) -> list[Path]:
    """Return the published checkpoints, oldest first."""
    named = (path for path in folder.glob("step-*") if _PUBLISHED.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def last_good(folder: Path) -> str:
    """Return which checkpoint a run will resume from, for the end of a message."""
    found = published(folder)
    return f"the run resumes from {found[-1]}" if found else "there is no checkpoint yet"


def publish(partial: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name; an existing one of the same step is replaced."""
    # Delete the old checkpoint only once the new one has its name.
    replaced = _set_aside(final) if final.exists() else None
    os.rename(partial, final)
    flush(final.parent)
    if replaced:
        shutil.rmtree(replaced)


def retire(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``."""
    for old in published(folder)[:-keep]:
        try:
            shutil.rmtree(_set_aside(old))
        except OSError as error:  # an old checkpoint that stays only costs space
            _log.warning("could not remove an old checkpoint", path=old, reason=error)


def mark_damaged(paths: Iterable[Path]) -> None:
    """Rename checkpoints to ``*.damaged-1`` so that they are neither loaded nor counted."""
    for path in paths:
        os.rename(path, free_name(path, "damaged"))


def remove_partials(folder: Path) -> None:
    """Remove unfinished checkpoints of killed saves; no other process writes to the run folder."""
    for path in folder.glob("step-*.partial"):
        if _UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _log.warning("removing an unfinished checkpoint", path=path)
            shutil.rmtree(path)


def require_space(folder: Path) -> None:
    """Check before writing that a checkpoint of the last one's size fits: a full disk also breaks the logs.

    Raises:
        CheckpointError: there is too little free space.
    """
    found = published(folder)
    if not found:
        return
    needed = int(_HEADROOM * sum(path.stat().st_size for path in found[-1].rglob("*") if path.is_file()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"disk full: a checkpoint needs about {needed / 2**20:,.0f} MiB and {folder} has "
            f"{free / 2**20:,.0f} MiB free; free space, then start again; {last_good(folder)}"
        )


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint before its removal, so that a removal killed half-way leaves no published remains."""
    aside = path.with_name(path.name + ".old.partial")
    os.rename(path, aside)
    return aside
