"""Checkpoints on disk: written aside by all ranks, checked, published by one rename.

    <folder>/step-00000020/
        policy/         Megatron distributed checkpoint: weights, optimizer, schedule, version
        hf/             configuration and tokenizer of the starting model
        state.json      step, stream cursor, random states, resolved configuration
        manifest.json   every file with size and checksum; step, layout, versions
        COMPLETE        checksum of the manifest, written last; a folder without it is never loaded

Nothing else in the folder is ever a checkpoint: what a killed save leaves behind is named ``*.partial`` and is swept
away by the next one; what was found damaged and passed over is named ``*.damaged-1`` and stays.

All methods that may write or read are collectives: every rank calls them in the same order, and a failure on one rank
is the same ``CheckpointError`` on all of them.

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
    """One rank's part in writing the policy's state, planned."""

    def write(self) -> tuple[list[Path], Any]:
        """Write this rank's files to the disk itself; may run in another thread, and waits for no other rank.

        Returns:
            The files, and what ``conclude`` needs of every rank (picklable).
        """

    def conclude(self, results: list[Any]) -> list[Path]:
        """On the main rank, once every rank has written: write what makes it one, given what each ``write`` said."""


class Savable(Protocol):
    """The policy as its checkpoints see it."""

    def layout_text(self) -> str:
        """The layout it is trained under, for people to read."""

    def begin_save(self, folder: Path, snapshot: bool) -> Writing:
        """Plan to write the state as it is now into ``folder``, which exists; a collective.

        With ``snapshot`` the state may change before it has been written; what is written is that of this moment.
        """


@dataclass(frozen=True)
class _Written:
    """What one rank has to say about its writing."""

    files: dict[str, FileSum]
    result: Any


@dataclass(frozen=True)
class _Save:
    """A checkpoint on its way to the disk."""

    step: int
    final: Path
    layout: str
    writing: Writing
    written: Future[_Written]

    @property
    def partial(self) -> Path:
        return folders.partial_of(self.final)


class CheckpointStore:
    """The checkpoints of one run; the newest ``keep`` stay.

    As a context manager it waits for a checkpoint in the background when it is left.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        ranks: Ranks | None = None,
        background: bool = False,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: where they lie; on storage that all ranks share.
            keep: how many stay.
            ranks: the ranks that save and load together; None is a world of one.
            background: let ``save`` return while files are being written.
            fence: called on the main rank before anything is removed or published; raises ``CheckpointError`` where
                the checkpoints are another trainer's by now.
        """
        self._folder = folder
        self._keep = keep
        self._ranks = ranks or Ranks()
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._fence = fence
        self._underway: _Save | None = None

    def save(self, step: int, state: dict[str, Any], policy: Savable, model: Path) -> Path | None:
        """Publish the checkpoint of ``step`` and sweep away what is older than the newest ``keep``.

        In the background it returns once everything that the next step could change is copied; the checkpoint is
        published by a later ``poll``, ``save`` or ``finish``. One save waits for the one before it.

        Args:
            step: steps done.
            state: JSON-serialisable state, that of the main rank is kept; ``step`` is added.
            policy: what writes the policy's state.
            model: the starting model's folder, whose configuration and tokenizer files are copied.

        Returns:
            The published checkpoint; None while it is written in the background.

        Raises:
            CheckpointError: this one, or the one before it in the background, could not be written. Checkpoints
                already published are untouched.
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
        """Publish the checkpoint in the background if every rank has written its part; else nothing happens.

        Returns:
            The checkpoint if it was published by this call.

        Raises:
            CheckpointError: it could not be written.
        """
        underway = self._underway
        if underway is None or not all(self._ranks.all_gather(underway.written.done())):
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint in the background, if there is one, and publish it.

        Returns:
            The checkpoint if there was one.

        Raises:
            CheckpointError: it could not be written.
        """
        underway, self._underway = self._underway, None
        if underway is None:
            return None
        final = underway.final
        with self._discarding(final):
            # One rank writes the manifest; a thousand have no use for a thousand checksums.
            parts = self._ranks.gather(self._run_on_all_ranks(final, underway.written.result))
            self._on_main(final, lambda: self._publish(underway, parts or []))
        return final

    def latest(self, allow_previous: bool = False) -> Checkpoint | None:
        """The newest checkpoint, every file of it compared with its manifest, or None if the run has none.

        Args:
            allow_previous: pass over damaged ones, which are renamed to ``*.damaged-1``, with a warning.

        Raises:
            CheckpointError: the newest one is damaged (names the file), or all are and ``allow_previous`` is set.
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
                # Whoever only reads may meet a trainer that has published a newer one and swept this one away.
                return self.latest(allow_previous)
            before = self._folder / names[index - 1] if index else None
            if not allow_previous or before is None:
                way_on = (
                    f"checkpoint.allow_previous=true goes on from {before}"
                    if before
                    else "there is none before it: bring the file back, or start anew with --fresh"
                )
                raise CheckpointError(f"checkpoint {folder} cannot be used: {damage}; {way_on}")
            if self._ranks.is_main:
                _log.warning("passing over a checkpoint", path=folder, reason=damage, next=before)
            damaged.append(folder)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish what is in the background; after an error only where no other rank could be missing."""
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
            # Right after writing: the files are still in memory.
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
        folders.sweep_partials(self._folder)
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
        # Files of the policy's state were flushed by the rank that wrote them; names are flushed here.
        made = (path for path in model if path.is_dir())
        flush(*own, partial / MANIFEST, partial / POLICY, *made, partial / "hf", partial)
        (partial / MARKER).write_text(FileSum.of(partial / MANIFEST).checksum + "\n", encoding="utf-8")
        flush(partial / MARKER, partial)
        self._fence()
        folders.publish(partial, save.final)
        folders.retire(self._folder, self._keep)

    def _on_main(self, final: Path, work: Callable[[], T]) -> T:
        """``work`` on the main rank, and its result, or its failure, on every rank."""
        return self._ranks.on_main(self._explaining(final, work))

    def _run_on_all_ranks(self, final: Path, work: Callable[[], T]) -> T:
        """``work`` on every rank, and its own result on each, or the first failure on every rank."""
        return self._ranks.run_on_all_ranks(
            self._explaining(final, work), f"the end of its part of checkpoint {final.name}"
        )

    def _explaining(self, final: Path, work: Callable[[], T]) -> Callable[[], T]:
        """``work``, with whatever it raises made a ``CheckpointError`` that says what to do."""

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
                    f"run.dir, then start again: {folders.last_good(self._folder)}"
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
            f"{partial} of rank 0 is not visible on {os.uname().nodename}, and all ranks have to share run.dir"
        )


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: what the operating system said, not what three layers made of it."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
