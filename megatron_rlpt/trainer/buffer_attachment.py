"""The trainer's hold on a store: attached as its only living trainer, and attached again where the store forgot it.

attach ── another trainer renews its hold ──> refused
   │ nobody does, or it is known to have ended
   v
renewed every few seconds ── the store is empty or older than it was ──> attach, put everything back, go on
                          └─ another trainer attached since ──> refused: this one was taken for dead
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
"""Name of the trainer among what is announced."""
HOLD = 30.0
"""Seconds without a renewal after which a trainer that cannot be looked at counts as dead."""
RENEW = 7.5
"""Seconds between two renewals."""
_LEAVE = 2.0
"""Seconds that a renewal under way has to end when the buffer is let go of."""
_LOOK = 0.5
"""Seconds between two tries while another trainer may be alive."""

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
        """Nothing is attached yet.

        Args:
            buffer: the store.
            run: id of the run.
            replace: drop the groups of an earlier run of the same name.
            capacity: most groups on their way.
            max_attempts: claims after which a group is given up.
            settings: what workers compare with their own settings.
            put_back: put everything that is on its way under this fencing token; how many groups that is.
            cursor: number of the group that is taken next.
            holder: this process.
            clock: seconds, for time-outs.
            sleep: waits.
        """
        self._buffer = buffer
        self._run, self._replace = run, replace
        self._capacity, self._max_attempts, self._settings = capacity, max_attempts, settings
        self._put_back, self._cursor = put_back, cursor
        self._holder = str(holder)
        self._clock, self._sleep = clock, sleep
        self._fencing_token = 0
        self._mutex = threading.RLock()
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None

    def open(self, anew: bool = False) -> None:
        """Become the buffer's only trainer.

        Args:
            anew: drop what the store kept of this run.

        Raises:
            BufferConflictError: it holds groups of another run, or belongs to a trainer that lives.
            BufferUnavailableError: the store cannot be reached.
        """
        with self._mutex:
            self._attach(self._replace)
            if anew:
                # A store drops the groups of another run; this one has none of that name.
                self._attach(replace=True, run=f"{self._run}-dropped")
                self._attach(replace=True)
            self._announce()
            # What the store kept stays as it is, judged groups judged.
            self._again(self._put_back)
        self._keeper = threading.Thread(target=self._keep, name="attachment", daemon=True)
        self._keeper.start()

    def call(self, operation: Callable[[int], _Result]) -> _Result:
        """``operation`` with the current fencing token; after a store came back without it, once more.

        Raises:
            BufferConflictError: another trainer has attached.
            BufferUnavailableError: the store cannot be reached.
        """
        while True:
            fencing_token = self._fencing_token
            try:
                return operation(fencing_token)
            except BufferForgotError:
                self._recover(fencing_token)

    def restore(self) -> None:
        """Put back what the store has lost, although it still knows this trainer."""
        self._recover(self._fencing_token)

    def close(self) -> None:
        """Let go of the buffer, so that the next trainer need not wait."""
        self._closed.set()
        if self._keeper is not None:
            # A renewal under way would be cut off, and be an error of its own; one that waits for a lost store is.
            self._keeper.join(_LEAVE)
        with self._mutex, contextlib.suppress(RlptError):
            if self._fencing_token:
                # In this order: whoever has attached since has announced itself.
                self._buffer.hold(self._fencing_token, "", 0.0)
                self._buffer.withdraw(SETTINGS, TRAINER)

    def _recover(self, fencing_token: int) -> None:
        with self._mutex:
            if self._fencing_token != fencing_token:
                return  # another thread was faster
            self._attach(replace=True)
            self._announce()
            held = self._buffer.stats()
            count = self._again(self._put_back)
            lost = max(0, count - held.queued - held.leased - held.finished)
            _log.warning(
                "the rollout buffer came back older than it was, or empty; attached again, and what was lost is put "
                "back",
                buffer=self._buffer,
                lost=lost,
                groups=count,
            )

    def _again(self, put: Callable[[int], _Result]) -> _Result:
        """``put`` with the current fencing token, also if the store forgets it meanwhile."""
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
                        "another trainer held the rollout buffer; waiting whether it is alive",
                        trainer=other.describe() if other else "unknown",
                        seconds=HOLD,
                    )
                seen = held
            self._sleep(_LOOK)

    def _announce(self) -> None:
        self._buffer.announce(SETTINGS, TRAINER, self._settings, 2 * HOLD)

    def _keep(self) -> None:
        while not self._closed.wait(RENEW):
            # Whoever takes or puts next finds out, and says it better.
            try:
                self.call(lambda token: self._buffer.hold(token, self._holder, HOLD))
                self._announce()
            except RlptError:
                pass
            except Exception:
                # Connections were closed under it.
                if not self._closed.is_set():
                    raise
