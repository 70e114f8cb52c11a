"""Checkpoints on disk: written aside, marked complete, published by one rename.

    <folder>/step-00000020/
        policy/        Megatron distributed checkpoint: weights, optimizer, schedule, version
        state.json     step, stream cursor, random states, resolved configuration
        COMPLETE       written last; a folder without it is never loaded

Nothing else in the folder is ever a checkpoint: what a killed save leaves behind is named ``*.partial`` and is swept
away by the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.observe import get_logger

_log = get_logger(__name__)

MARKER = "COMPLETE"
POLICY = "policy"
STATE = "state.json"
_PUBLISHED = re.compile(r"step-\d{8,}")
_HEADROOM = 1.1
"""A new checkpoint may be this much larger than the last before the disk counts as full."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"])

    @property
    def policy(self) -> Path:
        """Folder of the policy's own state."""
        return self.folder / POLICY


class CheckpointStore:
    """The checkpoints of one run; the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, state: dict[str, Any], save_policy: Callable[[Path], None]) -> Path:
        """Publish the checkpoint of ``step`` and sweep away what is older than the newest ``keep``.

        Args:
            step: steps done.
            state: JSON-serialisable state; ``step`` is added.
            save_policy: writes the policy's state into the folder it is given.

        Raises:
            CheckpointError: it could not be written. Checkpoints already published are untouched.
        """
        final = self._folder / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep_partials()
            self._require_space()
            partial.mkdir()
            save_policy(partial / POLICY)
            (partial / STATE).write_text(json.dumps(state | {"step": step}), encoding="utf-8")
            _flush(partial)
            (partial / MARKER).write_text("", encoding="utf-8")
            _sync(partial)
            # The same step saved again: the old one goes only once the new one is in its place.
            replaced = _set_aside(final) if final.exists() else None
            os.rename(partial, final)
            _sync(self._folder)
            if replaced:
                shutil.rmtree(replaced)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"checkpoint {final} could not be written ({_reason(error)}); free space or choose another run.dir, "
                f"then start again: {self._last_good()}"
            ) from error
        for old in self._published()[: -self._keep]:
            try:
                shutil.rmtree(_set_aside(old))
            except OSError as error:  # the new one is safe; an old one that stays only costs space
                _log.warning("could not remove an old checkpoint", path=old, reason=error)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None if the run has none.

        Raises:
            CheckpointError: a published checkpoint is damaged.
        """
        published = self._published()
        if not published:
            return None
        folder = published[-1]
        if not (folder / MARKER).is_file():
            raise CheckpointError(
                f"{folder} has no {MARKER} marker, so it is not whole; delete it to go on from the one before"
            )
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if not (isinstance(state, dict) and isinstance(state.get("step"), int)):
                raise ValueError("it names no step")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder / STATE} cannot be read ({error}); delete {folder} to go on from the one before"
            ) from None
        return Checkpoint(folder, state)

    def _published(self) -> list[Path]:
        named = (path for path in self._folder.glob("step-*") if _PUBLISHED.fullmatch(path.name) and path.is_dir())
        return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))

    def _sweep_partials(self) -> None:
        for path in self._folder.glob("step-*.partial"):
            _log.warning("sweeping away an unfinished checkpoint", path=path)
            shutil.rmtree(path)

    def _require_space(self) -> None:
        """Refuse before writing when the last checkpoint would not fit again: a full disk also breaks the logs."""
        published = self._published()
        if not published:
            return
        needed = int(_HEADROOM * sum(path.stat().st_size for path in published[-1].rglob("*") if path.is_file()))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise CheckpointError(
                f"disk full: a checkpoint needs about {needed / 2**20:,.0f} MiB and {self._folder} has "
                f"{free / 2**20:,.0f} MiB free; free space, then start again: {self._last_good()}"
            )

    def _last_good(self) -> str:
        published = self._published()
        return f"it goes on from {published[-1]}" if published else "no checkpoint has been written so far"


def _set_aside(published: Path) -> Path:
    """Unpublish a checkpoint before it is removed: killed half-way, the removal leaves no damaged one with a marker."""
    aside = published.with_name(published.name + ".old.partial")
    os.rename(published, aside)
    return aside


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: what the operating system said, not what three layers made of it."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _flush(folder: Path) -> None:
    """Everything under ``folder`` on the disk before the marker says so, names included."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
