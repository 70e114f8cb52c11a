"""One trainer per run folder: a lock for shared file systems that never outlives its holder for long.

    <run.dir>/lock/00000041    the holder, as JSON; the file with the highest number counts

Not every shared file system supports ``flock`` across machines, and a plain lock file would have to be removed after a
crash by one of several processes that may arrive concurrently. So the lock is a number that only rises: to take or
renew it, a process creates the file with the next number, which succeeds for only one process (``link`` is atomic on
the file server, whatever a client has cached).

    take:   no process holds it, or the holder has ended (same machine) or not renewed it for ``LIMIT`` seconds
    renew:  every ``RENEW`` seconds, and before a write that could harm another trainer
    lost:   the next number exists or the own file is missing: another trainer has taken over; write nothing more

A released lock stays as a file without a holder, so that numbers keep rising and a trainer that was suspended notices
that another one has run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.errors import CheckpointError, ConfigError, is_disk_full, not_written
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)

FOLDER = "lock"
"""Name of the folder in ``run.dir``."""
RENEW = 5.0
"""Seconds between two renewals."""
LIMIT = 60.0
"""Seconds without a renewal after which a holder on another machine counts as dead."""
_LOOK = 0.5
"""Seconds between two reads of a lock while waiting for its renewal."""
_KEPT = 3
"""Number of older files that a renewal keeps."""
_NUMBER = re.compile(r"\d{8,}")


@dataclass(frozen=True)
class _Held:
    """The lock as stored on disk."""

    number: int
    holder: Holder | None
    """None if the lock was released or is unreadable."""
    written: float
    """Modification time in seconds since the Unix epoch, by the file server's clock."""


class RunLock:
    """The lock of one run folder. After ``take`` a thread renews it until ``release`` or the end of the process."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: float = LIMIT,
        renew: float = RENEW,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """Create the lock object without touching the file system.

        Args:
            folder: the run folder.
            limit: seconds without a renewal after which a holder on another machine counts as dead.
            renew: seconds between two renewals.
            leave: ends the process when another trainer has taken over the folder.
        """
        self._run, self._folder = folder, folder / FOLDER
        self._limit, self._renew, self._leave = limit, renew, leave
        self._me = Holder.me()
        self._number = 0
        self._renewed = 0.0
        self._mutex = threading.RLock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Become the only trainer of the folder; create the folder if it does not exist.

        Raises:
            CheckpointError: another trainer holds it, or the disk is full.
            ConfigError: the folder is not writable for another reason.
        """
        try:
            while self._number == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                # The folder disappears when another trainer moves it aside.
                with contextlib.suppress(FileNotFoundError):
                    self._take()
        except OSError as error:
            raise not_written(f"run.dir {self._run}", error) from error
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Renew the lock before publishing, replacing or truncating files.

        Raises:
            CheckpointError: another trainer has taken over the folder, or the lock cannot be renewed.
        """
        with self._mutex:
            try:
                held = self._advance()
            except OSError as error:
                # On a full disk no other trainer can take over, and the caller's write will report the full disk.
                if is_disk_full(error) and self._is_highest():
                    return
                raise CheckpointError(
                    f"the lock of {self._run} cannot be renewed ({error}), so another trainer may have taken over the "
                    "folder; mend the file system, then start again"
                ) from error
            if not held:
                raise self._lost()

    def check(self) -> None:
        """Do the same as ``require``, but without file access while renewals are recent; for frequent writes.

        Raises:
            CheckpointError: see ``require``.
        """
        if _now() - self._renewed > self._limit / 3:
            self.require()

    def move_aside(self, target: Path) -> None:
        """Rename the folder, create an empty one in its place, and hold that one.

        Raises:
            CheckpointError: another trainer took the new folder first.
            ConfigError: a folder is not writable.
        """
        with self._mutex:
            self.require()
            try:
                os.rename(self._run, target)
                self._folder.mkdir(parents=True)
                number, self._number = self._number, 0
                self._claim(number + 1, self._me)
            except FileExistsError:
                raise CheckpointError(f"another trainer has started in {self._run}; choose another run.dir") from None
            except OSError as error:
                raise ConfigError(f"run.dir {self._run} cannot be moved to {target} ({error})") from error

    def release(self) -> None:
        """Release the folder."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._mutex:
            # Nothing to release if the lock was lost or the folder is missing.
            with contextlib.suppress(OSError):
                if self._number and self._is_there(self._number):
                    self._release()
            self._number = 0

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self) -> None:
        seen: int | None = None
        since = _now()
        while True:
            held = self._look()
            # A suspended trainer on this machine counts as alive, however old its last renewal.
            alive = held.holder.is_alive() if held.holder else False
            if alive or (alive is None and seen not in (None, held.number)):
                assert held.holder is not None
                raise self._refusal(held.holder)
            if alive is False or self._age(held) > self._limit or _now() - since > self._limit:
                # If another process is faster, the next read finds it.
                with contextlib.suppress(FileExistsError):
                    self._claim(held.number + 1, self._me)
                    if held.holder is not None:
                        _log.warning("taking over from a trainer that has ended", trainer=held.holder.describe())
                    return
                continue
            if seen is None:
                assert held.holder is not None
                _log.warning(
                    "a trainer on another machine holds the run folder; waiting to see if it renews its lock",
                    trainer=held.holder.describe(),
                    seconds=round(self._limit - self._age(held)),
                )
            seen = held.number
            time.sleep(min(_LOOK, self._limit / 10))

    def _refusal(self, holder: Holder) -> CheckpointError:
        return CheckpointError(
            f"run.dir {self._run} is held by another trainer ({holder.describe()}); end it, or choose another run.dir "
            f"(the lock of a killed trainer is free immediately, that of a lost machine after {self._limit:g} s)"
        )

    def _lost(self) -> CheckpointError:
        with contextlib.suppress(OSError):
            if (other := self._look().holder) is not None:
                return CheckpointError(
                    f"another trainer ({other.describe()}) has taken over run.dir {self._run}, because this one did "
                    f"not renew its lock for {self._limit:g} s; this one stops and writes nothing more"
                )
        return CheckpointError(
            f"run.dir {self._run} was moved or removed while this trainer held it; this trainer stops"
        )

    def _keep(self) -> None:
        """Renew until released, and end the process when the lock is lost, even if the trainer only waits."""
        warned = False
        while not self._over.wait(self._renew):
            with self._mutex:
                if self._over.is_set():
                    return
                try:
                    held = self._advance()
                except OSError as error:
                    if not warned:
                        _log.warning("the lock of the run folder cannot be renewed", reason=error)
                    warned = True
                    continue
                if held:
                    warned = False
                    continue
                error_line = f"error: {self._lost()}"
            _log.error(error_line.removeprefix("error: "))
            print(error_line, file=sys.__stderr__, flush=True)
            self._leave(CheckpointError.exit_code)
            return

    def _advance(self) -> bool:
        """Renew; return whether this process still holds the lock."""
        number = self._number
        try:
            self._claim(number + 1, self._me)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def _claim(self, number: int, holder: Holder | None) -> None:
        """Create the file with ``number`` and remove older ones, unless the lock was lost.

        Raises:
            FileExistsError: another process has taken the lock.
            FileNotFoundError: the folder is missing.
        """
        mine = self._folder / f"{number:08d}"
        # Written under another name first: a process that reads the lock finds a holder in it.
        record = {"holder": str(holder) if holder else None, "time": time.time()}
        write_atomically(mine, json.dumps(record), replace=False)
        # List the folder after changing it: a client does not answer this from its cache.
        numbers = self._numbers()
        if max(numbers, default=0) > number or (self._number and not self._is_there(self._number)):
            with contextlib.suppress(OSError):
                mine.unlink()
            raise FileExistsError(str(mine))
        # Keep the last few files: a listing read while names change then contains at least one of them.
        kept = number - _KEPT if self._number else number
        self._number, self._renewed = number, _now()
        for old in numbers:
            if old < kept:
                with contextlib.suppress(OSError):
                    (self._folder / f"{old:08d}").unlink()

    def _release(self) -> None:
        try:
            self._claim(self._number + 1, None)
        except OSError as error:
            if not is_disk_full(error):
                raise
            # A full disk takes no new file; an empty file has no holder either.
            os.truncate(self._folder / f"{self._number:08d}", 0)

    def _look(self) -> _Held:
        while True:
            number = max(self._numbers(), default=0)
            if not number:
                return _Held(0, None, 0.0)
            path = self._folder / f"{number:08d}"
            try:
                text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime
            except FileNotFoundError:
                continue  # renewed in the meantime
            return _Held(number, _holder_in(text), written)

    def _age(self, held: _Held) -> float:
        """Return the seconds since ``held`` was written, by the file server's clock."""
        probe = self._folder / f".{uuid.uuid4().hex}"
        probe.touch()
        try:
            return probe.stat().st_mtime - held.written
        finally:
            probe.unlink(missing_ok=True)

    def _is_highest(self) -> bool:
        with contextlib.suppress(OSError):
            return max(self._numbers(), default=0) == self._number
        return False

    def _is_there(self, number: int) -> bool:
        return (self._folder / f"{number:08d}").exists()

    def _numbers(self) -> list[int]:
        return [int(name) for name in os.listdir(self._folder) if _NUMBER.fullmatch(name)]


def _holder_in(text: str) -> Holder | None:
    try:
        return Holder.parse(json.loads(text)["holder"] or "")
    except (ValueError, TypeError, KeyError):
        return None


def _now() -> float:
    """Return seconds of a clock that includes time in suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
