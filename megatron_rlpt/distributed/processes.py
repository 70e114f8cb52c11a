"""Child processes that end with this one and are restarted within limits; signals that request the end of this one."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import enum
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_rlpt.backoff import Backoff

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that request a trainer to stop; schedulers send them before a job's time limit."""
_SET_PARENT_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG`` of linux/prctl.h."""
_RESTART_BACKOFF = Backoff(1.0, 60.0)
_POLL = 0.2
"""Seconds between two looks of a supervisor at its children."""
_SIGNALED = 128


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a new session; it receives SIGTERM when this process ends, even if killed (Linux).

    Call it from the main thread: the signal is sent when the thread that started the process ends.

    Args:
        command: program and arguments.
        options: further options of ``subprocess.Popen``.
    """
    return subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with(os.getpid()), **options)


def _end_with(parent: int) -> Callable[[], None]:
    set_option = ctypes.CDLL(None).prctl

    def prepare() -> None:
        set_option(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the signal was set up
            os._exit(1)

    return prepare


def allow_open_files() -> None:
    """Let this process open as many files as the system allows it, usually far more than the 1,024 it starts with.

    Sockets count as files, and a rank has several to every rank that it exchanges data with.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS has limits that it does not name
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_all(processes: Collection[subprocess.Popen[bytes]], seconds: float) -> None:
    """Send SIGTERM to ``processes``, wait up to ``seconds`` for all of them, then kill their process groups.

    A group is killed even if its first process has ended: remaining helpers hold memory and ports.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_and_leave(work: Callable[[], object]) -> NoReturn:
    """Run ``work`` and end the process; an exception gives the same exit code as in Python."""
    try:
        work()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process as Python does, but skip the teardown of imported modules.

    The teardown takes 2 s after Megatron and 4 s after vLLM, and frees nothing that the operating system would not
    free. Non-daemon threads are joined, and ``atexit`` functions run.

    Args:
        code: exit code; 1 instead of 0 if the output could not be written.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as error:
            code = code or 1
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    ctypes.CDLL(None).fflush(None)  # output of C libraries, for instance NCCL
    os._exit(code)


class EndRequest:
    """A request to end this process, by signals; the main thread can wait for it.

    Not a ``threading.Event``: the handler runs in the main thread between any two instructions, and would deadlock on
    the event's lock if that thread holds it. Not a ``queue.SimpleQueue`` either: in CPython 3.11 a signal at the moment
    of the time-out makes it wait forever (Modules/_queuemodule.c treats a negative remaining time as no time-out).
    """

    def __init__(self) -> None:
        self.times = 0
        """Number of signals received."""
        self._receiver, self._sender = socket.socketpair()
        for end in (self._receiver, self._sender):
            end.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._receiver, select.POLLIN)

    def listen(self, *numbers: signal.Signals) -> None:
        """Handle these signals from now on, SIGTERM and SIGINT by default; main thread only."""
        for number in numbers or (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def is_set(self) -> bool:
        """Return whether the end was requested."""
        return self.times > 0

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for a new signal; return whether the end was requested at all."""
        if self._poll.poll(seconds * 1000):
            self._receiver.recv(1)
        return self.is_set()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        with contextlib.suppress(BlockingIOError):  # the socket is full of unread signals
            self._sender.send(b"\0")


class Restarts:
    """Decides whether a process that has ended is restarted, and after which delay."""

    MOST, WINDOW = 5, 600.0
    """Highest number of restarts, and the seconds in which they are counted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()

    def ended(self) -> float | None:
        """Record an end; return the seconds to wait before the restart, or None if the process ended too often."""
        now = self._clock()
        while self._ends and now - self._ends[0] > self.WINDOW:
            self._ends.popleft()
        self._ends.append(now)
        if len(self._ends) > self.MOST:
            return None
        return _RESTART_BACKOFF.delay(len(self._ends))


def exit_code_of(returncode: int) -> int:
    """Return the exit code that a shell reports: 128 plus the number of the signal that ended the process."""
    return returncode if returncode >= 0 else _SIGNALED - returncode


@dataclass
class Child:
    """One command of a ``Supervisor``, run by one process after another."""

    name: str
    command: Sequence[str]
    restart_on: Callable[[int], bool]
    log: Path | None
    options: Mapping[str, Any]
    restarts: Restarts
    starts: int = 0
    began: float = 0.0
    """When the current process started (``time.monotonic``)."""
    due: float | None = None
    """When to start the next process, while the back-off lasts."""
    final: bool = False
    """Whether it ended and stays ended."""
    process: subprocess.Popen[bytes] = field(init=False)
    """The current process, or the last one."""

    def start(self) -> None:
        """Start a process.

        Raises:
            OSError: the program or the log cannot be opened.
        """
        with contextlib.ExitStack() as stack:
            output = {}
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                output = {"stdout": stack.enter_context(self.log.open("ab")), "stderr": subprocess.STDOUT}
            self.process = start_child(self.command, **output, **self.options)
        self.starts, self.began, self.due = self.starts + 1, time.monotonic(), None


class EndReason(enum.StrEnum):
    """Why a supervisor does not restart a child."""

    ended = "ended"
    """Its exit code asks for no restart."""
    at_start = "failed at its start"
    """Its first process failed within ``Supervisor.quick`` seconds."""
    too_often = "ended too often"
    """It ended more than ``Restarts.MOST`` times within ``Restarts.WINDOW`` seconds."""


@dataclass(frozen=True)
class ChildEnd:
    """A child that ended and is not restarted."""

    child: Child
    returncode: int
    """As of ``subprocess.Popen``."""
    reason: EndReason


class Supervisor:
    """Keep child processes running: restart what ends, later each time, until a child ends for good.

    Children receive SIGTERM when this process ends, even if it is killed. Call all methods from the main thread (see
    ``start_child``).
    """

    def __init__(
        self,
        *,
        quick: float = 0.0,
        on_start: Callable[[Child], object] = lambda child: None,
        on_restart: Callable[[Child, int, float], object] = lambda child, returncode, delay: None,
    ) -> None:
        """
        Args:
            quick: do not restart a child whose first process exits with an error within this many seconds.
            on_start: called after every start.
            on_restart: called when a child ended and will be restarted; with its return code and the delay in seconds.
        """
        self._quick, self._on_start, self._on_restart = quick, on_start, on_restart
        self.children: list[Child] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        restart_on: Callable[[int], bool] = lambda returncode: True,
        log: Path | None = None,
        **options: Any,
    ) -> Child:
        """Start a child.

        Args:
            name: for reports.
            command: program and arguments.
            restart_on: whether to restart the child after this return code; always by default.
            log: file to append standard output and standard error to; by default they stay those of this process.
            options: further ones of ``subprocess.Popen``.

        Raises:
            OSError: the program or the log cannot be opened.
        """
        child = Child(name, command, restart_on, log, options, Restarts())
        child.start()
        self.children.append(child)
        self._on_start(child)
        return child

    def run(self, wait: Callable[[float], bool]) -> ChildEnd | None:
        """Keep the children running until one ends for good, or until ``wait`` returns true.

        Call it again to go on with the remaining children.

        Args:
            wait: wait for so many seconds and return whether to stop.

        Returns:
            The child that ended, or None to stop.
        """
        while not wait(_POLL):
            for child in self.children:
                if (end := self._look_at(child)) is not None:
                    return end
        return None

    def end(self, seconds: float) -> None:
        """End all children: SIGTERM, then SIGKILL after ``seconds``."""
        end_all([child.process for child in self.children], seconds)

    def _look_at(self, child: Child) -> ChildEnd | None:
        now = time.monotonic()
        if child.final:
            return None
        if child.due is not None:
            if now >= child.due:
                child.start()
                self._on_start(child)
            return None
        code = child.process.poll()
        if code is None:
            return None
        end_all([child.process], 0.0)  # helpers that outlived it hold memory and ports
        reason, delay = EndReason.ended, None
        if child.restart_on(code):
            delay = child.restarts.ended()
            if child.starts == 1 and code > 0 and now - child.began < self._quick:
                reason, delay = EndReason.at_start, None
            elif delay is None:
                reason = EndReason.too_often
        if delay is None:
            child.final = True
            return ChildEnd(child, code, reason)
        child.due = now + delay
        self._on_restart(child, code, delay)
        return None
