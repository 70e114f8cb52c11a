"""Processes that start quickly: forked from one that has only imported the modules that they need.

Importing Megatron or vLLM takes ten times as long as the work of a process in most tests. Each process is still
separate, in its own session: it can be killed, and shares only the memory pages of the imports with others. All
processes of a test run share what their forks are forked from. An engine that a trainer spawns is forked too, from a
copy of the trainer as it was when it started.

    process = forked(VLLM, [sys.executable, "-m", "megatron_rlpt", "train", "-c", "run.yaml"])
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib
import json
import multiprocessing.util
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Mapping, Sequence
from multiprocessing import popen_spawn_posix, resource_tracker
from pathlib import Path
from typing import IO, Any

from megatron_rlpt.distributed.processes import run_and_leave

MEGATRON = (
    "megatron_rlpt.trainer.run",
    "megatron_rlpt.judge_workers.serve",
    # Modules that these import when they are called, and those of the test modules of a world.
    "megatron_rlpt.cli.main",
    "megatron_rlpt.cli.plan",
    "typer._adapters",
    "megatron_rlpt.rollout.megatron.engine",
    "megatron_rlpt.rollout.megatron.model",
    "megatron_rlpt.rollout.megatron.sampling",
    "megatron_rlpt.rollout.weight_sync.megatron_refit",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.encoder_decoder.configuration_encoder_decoder",
    "torch._dynamo",
    "torch.profiler",
    "pytest",
)
"""Imports of a rank, with Megatron's engine or without an engine, or of a judge worker."""
VLLM = (
    *MEGATRON,
    "vllm.entrypoints.llm",
    # Modules that these import when they are called.
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.llm_engine",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "megatron_rlpt.teacher.likelihood",
    "compiled_sampler",
)
"""Imports of a trainer that starts an engine."""
LAUNCHER = str(Path(__file__).resolve().parents[1] / ".venv-launch/bin/python")
"""The Python that has nemo-run."""
LAUNCH = ("megatron_rlpt.cli.main", "megatron_rlpt.config.loading", "launch.experiment")
"""Imports of ``rlpt launch``, in the environment that has nemo-run."""
_LARGEST = 1 << 20
"""Bytes of a request."""
_MOST_FILES = 64
"""Open files that come with a request."""


class Forked:
    """A process with the part of the interface of ``subprocess.Popen`` that tests use."""

    def __init__(self, pid: int, said: socket.socket, out: IO[str] | None, err: IO[str] | None) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._said, self._out, self._err = said, out, err

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._said], [], [], 0)[0]:
            self._take()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        if self.returncode is None:
            if not select.select([self._said], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self._take()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process to end; return its standard output and standard error, if not sent to a file."""
        self.wait(timeout)
        texts = []
        for file in (self._out, self._err):
            if file:
                file.seek(0)
            texts.append(file.read() if file else "")
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _take(self) -> None:
        said = self._said.recv(64)
        assert said, "the process that the others are forked from has ended"
        self.returncode = int(said)
        self._said.close()


def forked(
    modules: tuple[str, ...],
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | None = None,
) -> Forked:
    """Start ``command`` in a process that has imported ``modules``.

    Args:
        modules: already imported in the process.
        command: a Python, then ``-m`` and a module, or a script, then arguments.
        env: environment variables; None for those of this process.
        cwd: working directory; None for that of this process.
        output: file for all output; None for two files that ``communicate`` reads.
    """
    python, *rest = command
    out = err = None
    if output is None:
        out = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        err = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked = {"arguments": rest, "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd()), "files": [1, 2]}
    request = json.dumps(asked | {"session": True}).encode()
    assert len(request) < _LARGEST
    files = [theirs.fileno(), (output or out).fileno(), (output or err).fileno()]
    socket.send_fds(_parent(python, modules), [request], files)
    theirs.close()
    pid = ours.recv(64)
    assert pid, f"the process that has imported {modules} has ended"
    return Forked(int(pid), ours, out, err)


def forked_launcher(*arguments: str, **options: Any) -> Forked:
    """Start ``rlpt`` in the environment that launches; ``options`` are those of ``forked``."""
    return forked(LAUNCH, [LAUNCHER, "-m", "megatron_rlpt", *arguments], **options)


_PARENTS: dict[tuple[str, tuple[str, ...]], socket.socket] = {}


def _parent(python: str, modules: tuple[str, ...]) -> socket.socket:
    """Return a connection to the parent of the forks, which all processes of a test run share."""
    if (python, modules) not in _PARENTS:
        _PARENTS[python, modules] = _connect(python, modules)
    return _PARENTS[python, modules]


def _connect(python: str, modules: tuple[str, ...]) -> socket.socket:
    """Connect to the parent of the forks, and start it if no process of this test run has."""
    # The controller of xdist, if this is one of its workers.
    run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    name = f"\0rlpt-tests-{run}-{hashlib.sha256(repr((python, modules)).encode()).hexdigest()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        try:
            listening.bind(name)
        except OSError:
            pass  # another process has taken the name
        else:
            listening.listen(64)
            subprocess.Popen(
                [python, __file__, str(listening.fileno()), str(run), *modules],
                pass_fds=[listening.fileno()],
                # One thread only: children do not inherit others.
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deadline = time.monotonic() + 60
    while connection.connect_ex(name):  # the other process does not listen yet
        assert time.monotonic() < deadline, f"nothing listens that has imported {modules}"
        time.sleep(0.01)
    return connection


def _serve(own: socket.socket, run: int) -> dict[str, Any]:
    """Fork for every request, and report how each child ended. In the child, return the request.

    Args:
        own: a connection that brings requests, or where such connections arrive.
        run: the process for which this one works; this one ends with it.
    """
    chosen = selectors.DefaultSelector()
    try:
        ended = os.pidfd_open(run)
    except ProcessLookupError:  # it has ended by now
        sys.exit()
    chosen.register(ended, selectors.EVENT_READ)
    chosen.register(own, selectors.EVENT_READ)
    while True:
        for key, _ in chosen.select():
            if key.fd == ended:
                sys.exit()
            if key.data:
                pid, said = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                chosen.unregister(key.fileobj)
                os.close(key.fd)
                with contextlib.suppress(OSError):  # the caller has closed its end
                    said.send(str(code).encode())
                said.close()
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                chosen.register(connection.accept()[0], selectors.EVENT_READ)
                continue
            request, files, _, _ = socket.recv_fds(connection, _LARGEST, _MOST_FILES)
            if not request:
                chosen.unregister(connection)
                connection.close()
                continue
            asked = json.loads(request)
            pid = os.fork()
            if pid == 0:
                for other in list(chosen.get_map().values()):
                    if isinstance(other.fileobj, socket.socket):
                        other.fileobj.close()
                    else:
                        os.close(other.fd)
                    if other.data:
                        other.data[1].close()
                chosen.close()
                if asked["session"]:
                    os.setsid()
                with socket.socket(fileno=files[0]) as said:
                    said.send(str(os.getpid()).encode())
                _renumber(files[1:], asked["files"])
                return asked
            said = socket.socket(fileno=files[0])
            for file in files[1:]:
                os.close(file)
            chosen.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, said))


def _renumber(files: list[int], targets: list[int]) -> None:
    """Move open files to the numbers ``targets``."""
    above = max(targets) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    for file in files:
        os.close(file)
    for file, target in zip(moved, targets, strict=True):
        os.dup2(file, target)
        os.close(file)


def _become(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """Act like a new interpreter with these arguments."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "vllm" in sys.modules:
        _fork_what_is_spawned()
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
        return
    del sys.path[0]
    further = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry and entry not in sys.path]
    is_module = arguments[0] == "-m"
    sys.path[:0] = [cwd if is_module else str(Path(arguments[0]).parent), *further]
    sys.argv = arguments[1:] if is_module else arguments
    if is_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


class _ForkedBySpawn(popen_spawn_posix.Popen):
    """A process of multiprocessing's ``spawn`` that has imported what this one had when it started."""

    parent: socket.socket
    """Connection to a copy of this process as it was then: a child of this one, in the same session."""
    _one = threading.Lock()

    def _launch(self, process_obj: Any) -> None:
        resource_tracker.ensure_running()
        with self._one, unittest.mock.patch.object(multiprocessing.util, "spawnv_passfds", self._fork):
            super()._launch(process_obj)

    def _fork(self, executable: bytes, command: list[str], files: list[int]) -> int:
        targets = sorted({1, 2, *files})
        arguments = command[command.index("-c") :]
        self._said, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked = {"arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd(), "files": targets}
        request = json.dumps(asked | {"session": False}).encode()
        with theirs:
            socket.send_fds(self.parent, [request], [theirs.fileno(), *targets])
        return int(self._said.recv(64))

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code; None if the process still runs, and ``flag`` is not 0, which waits for its end."""
        select.select([self._said], [], [], 0 if flag == os.WNOHANG else None)
        with self._one:
            if self.returncode is None and select.select([self._said], [], [], 0)[0]:
                self.returncode = int(self._said.recv(64))
        return self.returncode


def _fork_what_is_spawned() -> None:
    """Let multiprocessing fork what it is to spawn from a copy of this process, which must not have threads yet.

    A new process would import vLLM again, which takes longer than what engines do in tests.
    """
    _ForkedBySpawn.parent, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    us = os.getpid()
    if os.fork():
        theirs.close()
        popen_spawn_posix.Popen = _ForkedBySpawn
        return
    _ForkedBySpawn.parent.close()
    copy = os.getpid()
    asked = _serve(theirs, us)
    parent_of = os.getppid
    os.getppid = lambda: us if parent_of() == copy else parent_of()  # processes watch the one that asked for them
    run_and_leave(lambda: _become(asked["arguments"], asked["env"], asked["cwd"]))


if __name__ == "__main__":
    number, owner, *names = sys.argv[1:]
    for name in names:
        importlib.import_module(name)
    # Keep the collector of the children off these objects, which would copy their memory pages.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # vLLM calls it when an engine ends
    asked = _serve(socket.socket(fileno=int(number)), int(owner))
    run_and_leave(lambda: _become(asked["arguments"], asked["env"], asked["cwd"]))
