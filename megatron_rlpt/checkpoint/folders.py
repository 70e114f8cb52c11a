"""The folder that checkpoints lie in: names, publishing by rename, retention, space. Only the main rank changes it."""

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
"""Names that nothing but this module gives. Whatever else lies in the folder is somebody else's."""
_HEADROOM = 1.1
"""A new checkpoint may be this much larger than the last before the disk counts as full."""


def name_of(step: int) -> str:
    """Name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_of(final: Path) -> int:
    """Steps that were done when the published checkpoint ``final`` was taken."""
    return int(final.name.removeprefix("step-"))


def partial_of(final: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return final.with_name(final.name + ".partial")


def published(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    named = (path for path in folder.glob("step-*") if _PUBLISHED.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def last_good(folder: Path) -> str:
    """What a run goes on from, as the end of a message."""
    found = published(folder)
    return f"it goes on from {found[-1]}" if found else "no checkpoint has been written so far"


def publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name. The same step published again replaces the one before it."""
    # The old one goes only once the new one is in its place.
    replaced = _set_aside(final) if final.exists() else None
    os.rename(partial, final)
    flush(final.parent)
    if replaced:
        shutil.rmtree(replaced)


def retire(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep``."""
    for old in published(folder)[:-keep]:
        try:
            shutil.rmtree(_set_aside(old))
        except OSError as error:  # the new one is safe; an old one that stays only costs space
            _log.warning("could not remove an old checkpoint", path=old, reason=error)


def mark_damaged(paths: Iterable[Path]) -> None:
    """Rename checkpoints so that they count no more, neither as the newest nor among those that are kept."""
    for path in paths:
        os.rename(path, free_name(path, "damaged"))


def sweep_partials(folder: Path) -> None:
    """Remove what killed saves of this run have left behind; the run's folder is ours alone."""
    for path in folder.glob("step-*.partial"):
        if _UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _log.warning("sweeping away an unfinished checkpoint", path=path)
            shutil.rmtree(path)


def require_space(folder: Path) -> None:
    """Refuse before writing when the last checkpoint would not fit again: a full disk also breaks the logs.

    Raises:
        CheckpointError: says how much is needed and how much is free.
    """
    found = published(folder)
    if not found:
        return
    needed = int(_HEADROOM * sum(path.stat().st_size for path in found[-1].rglob("*") if path.is_file()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"disk full: a checkpoint needs about {needed / 2**20:,.0f} MiB and {folder} has "
            f"{free / 2**20:,.0f} MiB free; free space, then start again: {last_good(folder)}"
        )


def _set_aside(path: Path) -> Path:
    """Unpublish a checkpoint before it is removed: killed half-way, the removal leaves no damaged one with a marker."""
    aside = path.with_name(path.name + ".old.partial")
    os.rename(path, aside)
    return aside
