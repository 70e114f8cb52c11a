"""One trainer per run folder: a lock that works on a file system that machines share, and outlives no crash.

    <run.dir>/lock/00000041    the holder, as JSON; the file with the highest number counts

``flock`` is not handed on by every shared file system, and a file that only says who holds the folder has to be removed
after a crash, by one of several that may come at the same time. So the lock is a number that only rises: to take or to
renew it is to make the file of the next number, which succeeds for one process alone (``link`` is atomic on the file
server, whatever a client has cached).

    take:   nobody holds it, or who does has ended (same machine), or has renewed nothing for ``LIMIT`` seconds
    renew:  every ``RENEW`` seconds, and before anything that another trainer's work would suffer from
    lost:   the next number is there already, or the own one is gone: another trainer has taken over; write nothing more

A released lock stays as a file without a holder, so that numbers go on and a trainer that comes back from the dead
finds out.
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
"""Seconds without a renewal after which the holder on another machine counts as dead."""
_LOOK = 0.5
"""Seconds between two looks at a lock that may be renewed or not."""
_KEPT = 3
"""Numbers below one's own that stay when it is renewed."""
_NUMBER = re.compile(r"\d{8,}")


@dataclass(frozen=True)
class _Held:
    """The lock as it lies on the disk."""

    number: int
    holder: Holder | None
    """None where it was released, or cannot be read."""
    written: float
    """When, in seconds since the Unix epoch by the file server's clock."""


class RunLock:
    """The lock of one run folder; taken by ``take``, renewed by a thread until ``release`` or the process ends."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: float = LIMIT,
        renew: float = RENEW,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: the run folder.
            limit: seconds without a renewal after which a holder on another machine counts as dead.
            renew: seconds between two renewals.
            leave: ends the process, once another trainer has taken the folder over.
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
        """Become the only trainer of the folder, which is made unless it is there.

        Raises:
            CheckpointError: another trainer holds it, or the disk is full.
            ConfigError: the folder cannot be written for another reason.
        """
        try:
            while self._number == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                # Gone meanwhile: another trainer has moved the folder aside.
                with contextlib.suppress(FileNotFoundError):
                    self._take()
        except OSError as error:
            raise not_written(f"run.dir {self._run}", error) from error
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Make sure that this is still the folder's trainer before it publishes, replaces or cuts something.

        Raises:
            CheckpointError: another trainer has taken the folder over, or that cannot be found out.
        """
        with self._mutex:
            try:
                held = self._advance()
            except OSError as error:
                # On a full disk nobody takes a lock over, and whoever has asked is about to find it full himself.
                if is_disk_full(error) and self._is_highest():
                    return
                raise CheckpointError(
                    f"the lock of {self._run} cannot be renewed ({error}), so another trainer may have taken the "
                    "folder over; mend the file system, then start again"
                ) from error
            if not held:
                raise self._lost()

    def check(self) -> None:
        """The same where renewals are up to date, without touching the file system; for what is written often.

        Raises:
            CheckpointError: see ``require``.
        """
        if _now() - self._renewed > self._limit / 3:
            self.require()

    def move_aside(self, target: Path) -> None:
        """Rename the folder and hold the one that takes its place.

        Raises:
            CheckpointError: another trainer was faster to take the new one.
            ConfigError: a folder cannot be written.
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
        """Let go of the folder."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._mutex:
            # Not ours any more, or not there: nothing to let go of.
            with contextlib.suppress(OSError):
                if self._number and self._is_there(self._number):
                    self._let_go()
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
            # A trainer of this machine that only stands still is alive however long it renewed nothing.
            alive = held.holder.is_alive() if held.holder else False
            if alive or (alive is None and seen not in (None, held.number)):
                assert held.holder is not None
                raise self._refusal(held.holder)
            if alive is False or self._age(held) > self._limit or _now() - since > self._limit:
                # Where another one is faster, the next look finds it.
                with contextlib.suppress(FileExistsError):
                    self._claim(held.number + 1, self._me)
                    if held.holder is not None:
                        _log.warning("taking over from a trainer that is gone", trainer=held.holder.describe())
                    return
                continue
            if seen is None:
                assert held.holder is not None
                _log.warning(
                    "a trainer on another machine holds the run folder; waiting whether it renews its lock",
                    trainer=held.holder.describe(),
                    seconds=round(self._limit - self._age(held)),
                )
            seen = held.number
            time.sleep(min(_LOOK, self._limit / 10))

    def _refusal(self, holder: Holder) -> CheckpointError:
        return CheckpointError(
            f"run.dir {self._run} is held by another trainer ({holder.describe()}); end that one, or choose another "
            f"run.dir (a trainer that is killed lets go at once, one on a lost machine after {self._limit:g} s)"
        )

    def _lost(self) -> CheckpointError:
        with contextlib.suppress(OSError):
            if (other := self._look().holder) is not None:
                return CheckpointError(
                    f"another trainer ({other.describe()}) has taken over run.dir {self._run}, because this one did "
                    f"not renew its lock for {self._limit:g} s; it stops and writes nothing more"
                )
        return CheckpointError(f"run.dir {self._run} was moved or removed while this trainer held it; it stops")

    def _keep(self) -> None:
        """Renew until released. Nobody else would stop a trainer that waits for hours while another goes on."""
        told = False
        while not self._over.wait(self._renew):
            with self._mutex:
                if self._over.is_set():
                    return
                try:
                    held = self._advance()
                except OSError as error:
                    if not told:
                        _log.warning("the lock of the run folder cannot be renewed", reason=error)
                    told = True
                    continue
                if held:
                    told = False
                    continue
                error_line = f"error: {self._lost()}"
            _log.error(error_line.removeprefix("error: "))
            print(error_line, file=sys.__stderr__, flush=True)
            self._leave(CheckpointError.exit_code)
            return

    def _advance(self) -> bool:
        """Renew; whether the lock is still ours."""
        number = self._number
        try:
            self._claim(number + 1, self._me)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return False
        return True

    def _claim(self, number: int, holder: Holder | None) -> None:
        """Make the file of ``number`` and remove those below, unless the lock was lost meanwhile.

        Raises:
            FileExistsError: another process has done so.
            FileNotFoundError: the folder, or the file held so far, is gone.
        """
        mine = self._folder / f"{number:08d}"
        # Written under another name first: a process that reads the lock finds a holder in it.
        record = {"holder": str(holder) if holder else None, "time": time.time()}
        write_atomically(mine, json.dumps(record), replace=False)
        # Looked at after a change of our own, which no client answers from its cache.
        numbers = self._numbers()
        if max(numbers, default=0) > number or (self._number and not self._is_there(self._number)):
            with contextlib.suppress(OSError):
                mine.unlink()
            raise FileExistsError(str(mine))
        # Of one's own numbers the last stay: a listing that is read while names come and go finds one of them.
        kept = number - _KEPT if self._number else number
        self._number, self._renewed = number, _now()
        for old in numbers:
            if old < kept:
                with contextlib.suppress(OSError):
                    (self._folder / f"{old:08d}").unlink()

    def _let_go(self) -> None:
        try:
            self._claim(self._number + 1, None)
        except OSError as error:
            if not is_disk_full(error):
                raise
            # A full disk takes no new file; an empty one has no holder either.
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
                continue  # renewed meanwhile
            return _Held(number, _holder_in(text), written)

    def _age(self, held: _Held) -> float:
        """Seconds since it was written: by the file server's clock, which writes beside files when they were made."""
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
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
