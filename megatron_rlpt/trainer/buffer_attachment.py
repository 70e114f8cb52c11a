"""The trainer's hold on a rollout buffer: at most one trainer is attached; it attaches again if the store loses data.

attach ── another trainer renews its hold ──> refused
   │ no trainer holds the buffer, or the holder has ended
   v
renew every few seconds ── the store is empty or older than before ──> attach, put all groups back, continue
                        └─ another trainer has attached ──> refused: this trainer counted as dead
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_rlpt.buffer.protocol import RolloutBuffer
from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.errors import BufferConflictError, BufferForgotError, BufferHeldError, RlptError
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.teacher.settings_fingerprint import SETTINGS

_log = get_logger(__name__)

TRAINER = "trainer"
"""Name under which the trainer announces its settings."""
HOLD = 30.0
"""Seconds without a renewal after which a trainer on another machine counts as dead."""
RENEW = 7.5
"""Seconds between two renewals."""
_LEAVE = 2.0
"""Seconds to wait for a renewal in progress when the buffer is released."""
_LOOK = 0.5
"""Seconds between two attempts while another trainer may be alive."""

_Result = TypeVar("_Result")


class Attachment:
    """One trainer's hold on a rollout buffer. Safe to use from several threads."""

    def __init__(
        self,
        buffer: RolloutBuffer,
        *,
        run: str,
        replace: bool,
        capacity: int,
        max_attempts: int,
        settings: str,
        put_back: Callable[[int], int],
        cursor: Callable[[], int],
        holder: Holder,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Create the attachment without attaching.

        Args:
            buffer: the rollout buffer.
            run: id of the run.
            replace: drop the groups of an earlier run of the same name.
            capacity: highest number of submitted groups.
            max_attempts: claims after which a group fails.
            settings: settings fingerprint that workers compare with theirs.
            put_back: puts all submitted groups under a fencing token; returns their number.
            cursor: returns the number of the next group to take.
            holder: this process.
            clock: returns seconds, for time-outs.
            sleep: waits for some seconds.
        """
        self._buffer = buffer
        self._run, self._replace = run, replace
        self._capacity, self._max_attempts, self._settings = capacity, max_attempts, settings
        self._put_back, self._cursor = put_back, cursor
        self._holder = str(holder)
        self._clock, self._sleep = clock, sleep
        self._fencing_token = 0
        self._attachments = 0
        """Times attached: an emptied store gives the same tokens again."""
        self._mutex = threading.RLock()
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None

    def open(self, discard: bool = False) -> None:
        """Attach as the only trainer of the buffer.

        Args:
            discard: discard the groups of this run in the store.

        Raises:
            BufferConflictError: the buffer holds groups of another run, or a living trainer is attached.
            BufferUnavailableError: the store is unreachable.
        """
        with self._mutex:
            self._attach(self._replace)
            if discard:
                # A store discards the groups of another run, so attach for a run of another name in between.
                self._attach(replace=True, run=f"{self._run}-dropped")
                self._attach(replace=True)
            self._announce()
            # Groups that the store still has are unchanged; judged groups stay judged.
            self._again(self._put_back)
        self._keeper = threading.Thread(target=self._keep, name="attachment", daemon=True)
        self._keeper.start()

    def call(self, operation: Callable[[int], _Result]) -> _Result:
        """Run ``operation`` with the fencing token; if the store has lost the trainer, attach again and repeat it.

        Raises:
            BufferConflictError: another trainer has attached.
            BufferUnavailableError: the store is unreachable.
        """
        while True:
            attachment = self._attachments
            try:
                return operation(self._fencing_token)
            except BufferForgotError:
                self._recover(attachment)

    def restore(self) -> None:
        """Put back the groups that the store has lost although it still knows this trainer."""
        self._recover(self._attachments)

    def close(self) -> None:
        """Release the buffer so that the next trainer need not wait."""
        self._closed.set()
        if self._keeper is not None:
            # Cutting off a renewal in progress would raise an error; only one that waits for a lost store is cut off.
            self._keeper.join(_LEAVE)
        with self._mutex, contextlib.suppress(RlptError):
            if self._fencing_token:
                # In this order: a trainer that has attached since then has announced its settings.
                self._buffer.hold(self._fencing_token, "", 0.0)
                self._buffer.withdraw(SETTINGS, TRAINER)

    def _recover(self, attachment: int) -> None:
        with self._mutex:
            if self._attachments != attachment:
                return  # another thread has already attached again
            self._attach(replace=True)
            self._announce()
            held = self._buffer.stats()
            count = self._again(self._put_back)
            lost = max(0, count - held.queued - held.leased - held.finished)
            _log.warning(
                "the rollout buffer came back older or empty; attached again and put the lost groups back",
                buffer=self._buffer,
                lost=lost,
                groups=count,
            )

    def _again(self, put: Callable[[int], _Result]) -> _Result:
        """Run ``put`` with the fencing token; if the store has lost the trainer, attach again and repeat it."""
        while True:
            try:
                return put(self._fencing_token)
            except BufferForgotError:
                self._attach(replace=True)

    def _attach(self, replace: bool, run: str = "") -> None:
        over, seen, since = "", None, self._clock()
        while True:
            try:
                self._fencing_token = self._buffer.attach(
                    run or self._run,
                    self._cursor(),
                    capacity=self._capacity,
                    max_attempts=self._max_attempts,
                    replace=replace,
                    holder=self._holder,
                    seconds=HOLD,
                    over=over,
                )
                self._attachments += 1
                return
            except BufferHeldError as error:
                other = Holder.parse(error.holder)
                alive = other.is_alive() if other else None
                if alive is False:
                    over = error.holder
                    continue
                held = (error.holder, error.until)
                if alive or seen not in (None, held) or self._clock() - since > 2 * HOLD:
                    raise BufferConflictError(
                        f"{self._buffer} belongs to another trainer that is alive "
                        f"({other.describe() if other else 'unknown'}); end that one, or set another buffer.name"
                    ) from None
                if seen is None:
                    _log.warning(
                        "another trainer holds the rollout buffer; waiting to see if it is alive",
                        trainer=other.describe() if other else "unknown",
                        seconds=HOLD,
                    )
                seen = held
            self._sleep(_LOOK)

    def _announce(self) -> None:
        self._buffer.announce(SETTINGS, TRAINER, self._settings, 2 * HOLD)

    def _keep(self) -> None:
        while not self._closed.wait(RENEW):
            # The next take or put meets the same error and reports it.
            try:
                self.call(lambda token: self._buffer.hold(token, self._holder, HOLD))
                self._announce()
            except RlptError:
                pass
            except Exception:
                # ``close`` closes connections that this thread may be using.
                if not self._closed.is_set():
                    raise
