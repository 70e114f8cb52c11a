"""Saves and loads checkpoints: all ranks write a temporary folder, which is published with one rename.

    <folder>/step-00000020/
        policy/         Megatron distributed checkpoint: weights, optimizer, schedule, version
        hf/             configuration and tokenizer of the starting model
        state.json      step, stream cursor, random states, resolved configuration
        manifest.json   every file with size and checksum; step, layout, versions
        COMPLETE        checksum of the manifest, written last; a folder without it is never loaded

No other name in the folder is a checkpoint: a killed save leaves ``*.partial``, which the next save removes; a damaged
checkpoint that was skipped is renamed to ``*.damaged-1`` and stays.

All methods that write or read are collectives: every rank calls them in the same order, and a failure on one rank
raises the same ``CheckpointError`` on all ranks.

    save ─> prepare (rank 0) ─> plan, copy ─> write + sum own files ─> manifest, marker, rename (rank 0)
                                              └ in the background ─┘   at the next poll, save or finish
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from megatron_rlpt.checkpoint import folders
from megatron_rlpt.checkpoint.manifest import CheckpointManifest, FileSum, sum_files, versions
from megatron_rlpt.checkpoint.reading import MANIFEST, MARKER, POLICY, STATE, Checkpoint, open_checkpoint
from megatron_rlpt.distributed.ranks import Ranks, is_lost_contact
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.files import flush
from megatron_rlpt.models.huggingface import copy_settings
from megatron_rlpt.observe import get_logger

T = TypeVar("T")
_log = get_logger(__name__)


class Writing(Protocol):
    """One rank's planned part of writing the policy's state."""

    def write(self) -> tuple[list[Path], Any]:
        """Write and flush this rank's files; may run in another thread, and waits for no other rank.

        Returns:
            The files, and this rank's input for ``conclude`` (picklable).
        """

    def conclude(self, results: list[Any]) -> list[Path]:
        """On the main rank, once every rank has written: write the metadata, given the results of each ``write``."""


class Savable(Protocol):
    """The policy, as far as checkpoints use it."""

    def layout_text(self) -> str:
        """Return the training layout as readable text."""

    def begin_save(self, folder: Path, snapshot: bool) -> Writing:
        """Plan to write the current state into the existing ``folder``; a collective.

        With ``snapshot`` the current state is copied, because it may change before it is written.
        """


@dataclass(frozen=True)
class _Written:
    """The files that one rank has written."""

    files: dict[str, FileSum]
    result: Any


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written."""

    step: int
    final: Path
    layout: str
    writing: Writing
    written: Future[_Written]

    @property
    def partial(self) -> Path:
        return folders.partial_of(self.final)


class CheckpointStore:
    """The checkpoints of one run, of which the newest ``keep`` stay.

    As a context manager it waits for the checkpoint in the background at its exit.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        ranks: Ranks | None = None,
        background: bool = False,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the store without touching the file system.

        Args:
            folder: the checkpoint folder, on storage that all ranks share.
            keep: number of checkpoints to keep.
            ranks: the ranks that save and load together; None is a world of one.
            background: let ``save`` return while files are being written.
            fence: called on the main rank before anything is removed or published; raises ``CheckpointError`` if
                another trainer has taken over the run.
        """
        self._folder = folder
        self._keep = keep
        self._ranks = ranks or Ranks()
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._fence = fence
        self._underway: _Save | None = None

    def save(self, step: int, state: dict[str, Any], policy: Savable, model: Path) -> Path | None:
        """Publish the checkpoint of ``step`` and remove all but the newest ``keep``.

        In the background, ``save`` returns once it has copied everything that the next step could change; a later
        ``poll``, ``save`` or ``finish`` publishes the checkpoint. A save waits for the previous one.

        Args:
            step: number of completed steps.
            state: JSON-serializable state; the main rank's is kept, with ``step`` added.
            policy: writes the policy's state.
            model: folder of the starting model, whose configuration and tokenizer files are copied.

        Returns:
            The published checkpoint; None while it is written in the background.

        Raises:
            CheckpointError: this checkpoint, or the previous one in the background, could not be written. Published
                checkpoints are unchanged.
        """
        self.finish()
        final = self._folder / folders.name_of(step)
        partial = folders.partial_of(final)
        with self._discarding(final):
            self._on_main(final, lambda: self._prepare(partial, state | {"step": step}, model))
            self._run_on_all_ranks(final, lambda: _require_shared(partial))
            writing = self._run_on_all_ranks(
                final, lambda: policy.begin_save(partial / POLICY, snapshot=self._pool is not None)
            )
        self._underway = _Save(step, final, policy.layout_text(), writing, self._start(writing, partial))
        return self.finish() if self._pool is None else None

    def poll(self) -> Path | None:
        """Publish the checkpoint in the background if every rank has written its part.

        Returns:
            The checkpoint, or None if nothing was published.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        underway = self._underway
        if underway is None or not all(self._ranks.all_gather(underway.written.done())):
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint in the background and publish it.

        Returns:
            The checkpoint, or None if there was none.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        underway, self._underway = self._underway, None
        if underway is None:
            return None
        final = underway.final
        with self._discarding(final):
            # Gather, not all_gather: only rank 0 writes the manifest.
            parts = self._ranks.gather(self._run_on_all_ranks(final, underway.written.result))
            self._on_main(final, lambda: self._publish(underway, parts or []))
        return final

    def latest(self, allow_previous: bool = False) -> Checkpoint | None:
        """Return the newest checkpoint after verifying it, or None if the run has none.

        Args:
            allow_previous: skip damaged checkpoints with a warning and rename them to ``*.damaged-1``.

        Raises:
            CheckpointError: the newest checkpoint is damaged, or, with ``allow_previous``, all of them are.
        """
        names = self._on_main(self._folder, lambda: [path.name for path in folders.published(self._folder)])
        damaged: list[Path] = []
        for index in reversed(range(len(names))):
            folder = self._folder / names[index]
            found, damage = open_checkpoint(folder, self._ranks)
            if found is not None:
                if damaged:
                    self._on_main(folder, lambda: folders.mark_damaged(damaged))
                return found
            if not self._on_main(folder, folder.exists):
                # A process that only reads may meet a trainer that has just published a newer one and removed this one.
                return self.latest(allow_previous)
            before = self._folder / names[index - 1] if index else None
            if not allow_previous or before is None:
                fix = (
                    f"set checkpoint.allow_previous=true to resume from {before}"
                    if before
                    else "there is no earlier one: restore the file, or start over with --fresh"
                )
                raise CheckpointError(f"checkpoint {folder} cannot be used: {damage}; {fix}")
            if self._ranks.is_main:
                _log.warning("skipping a damaged checkpoint", path=folder, reason=damage, next=before)
            damaged.append(folder)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the checkpoint in the background; after an error only in a world of one, where no rank is missing."""
        try:
            if error is None or self._ranks.size == 1:
                self.finish()
            elif self._underway is not None:
                _log.warning("leaving an unpublished checkpoint behind", path=self._underway.partial)
        except CheckpointError as second:
            if error is None:
                raise
            _log.error("checkpoint lost", reason=second)
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _start(self, writing: Writing, partial: Path) -> Future[_Written]:
        def write() -> _Written:
            files, result = writing.write()
            # Compute checksums right after writing, while the files are in the page cache.
            return _Written(sum_files(partial, [str(path.relative_to(partial)) for path in files]), result)

        if self._pool is not None:
            return self._pool.submit(write)
        done: Future[_Written] = Future()
        try:
            done.set_result(write())
        except Exception as error:
            done.set_exception(error)
        return done

    def _prepare(self, partial: Path, state: dict[str, Any], model: Path) -> None:
        self._fence()
        self._folder.mkdir(parents=True, exist_ok=True)
        folders.remove_partials(self._folder)
        folders.require_space(self._folder)
        (partial / POLICY).mkdir(parents=True)
        (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
        (partial / "hf").mkdir()
        copy_settings(model, partial / "hf")

    def _publish(self, save: _Save, parts: list[_Written]) -> None:
        partial = save.partial
        described = save.writing.conclude([part.result for part in parts])
        model = sorted((partial / "hf").rglob("*"))
        own = [*described, partial / STATE, *(path for path in model if path.is_file())]
        files = sum_files(partial, [str(path.relative_to(partial)) for path in own])
        for part in parts:
            files |= part.files
        CheckpointManifest(save.step, save.layout, files, versions()).write(partial / MANIFEST)
        # Each rank has flushed the policy files that it wrote; this flushes the folder entries.
        made = (path for path in model if path.is_dir())
        flush(*own, partial / MANIFEST, partial / POLICY, *made, partial / "hf", partial)
        (partial / MARKER).write_text(FileSum.of(partial / MANIFEST).checksum + "\n", encoding="utf-8")
        flush(partial / MARKER, partial)
        self._fence()
        folders.publish(partial, save.final)
        folders.retire(self._folder, self._keep)

    def _on_main(self, final: Path, work: Callable[[], T]) -> T:
        """Run ``work`` on the main rank; return its result or raise its error on every rank."""
        return self._ranks.on_main(self._explaining(final, work))

    def _run_on_all_ranks(self, final: Path, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; return each rank's result, or raise the first error on every rank."""
        return self._ranks.run_on_all_ranks(
            self._explaining(final, work), f"the end of its part of checkpoint {final.name}"
        )

    def _explaining(self, final: Path, work: Callable[[], T]) -> Callable[[], T]:
        """Wrap ``work`` so that any error becomes a ``CheckpointError`` that says what to do."""

        def run() -> T:
            try:
                return work()
            except CheckpointError:
                raise
            except Exception as error:
                if is_lost_contact(error):
                    raise
                _log.debug("checkpoint failed", exc_info=True)
                raise CheckpointError(
                    f"checkpoint {final} could not be written ({_reason(error)}); free space or choose another "
                    f"run.dir, then start again; {folders.last_good(self._folder)}"
                ) from error

        return run

    def _discarding(self, final: Path) -> _Discarding:
        return _Discarding(folders.partial_of(final) if self._ranks.is_main else None)


class _Discarding:
    """Removes an unfinished checkpoint when its save fails."""

    def __init__(self, partial: Path | None) -> None:
        self._partial = partial

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)


def _require_shared(partial: Path) -> None:
    if not (partial / STATE).is_file():
        raise FileNotFoundError(
            f"{partial} of rank 0 is not visible on {os.uname().nodename}; run.dir must be shared by all ranks"
        )


def _reason(error: BaseException) -> str:
    """Return the innermost cause in one line, usually the error of the operating system."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
