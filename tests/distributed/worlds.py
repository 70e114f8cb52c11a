"""Worlds of real processes over gloo, for tests with several ranks.

``run_world(4, function, *args)`` calls ``function(*args)`` in four new Python processes with the environment that
torchrun sets for its workers, and returns the four results by rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from prefork import MEGATRON, Forked, forked

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import RlptError
from megatron_rlpt.policy.layout import Layout

GRACE = 5.0
"""Seconds that the other ranks have, after one failed, to fail with their own error."""
LAST_LINES = 60


class WorldError(AssertionError):
    """A rank raised, died or did not finish in time; the message has the last lines of every rank that did."""


def run_world(
    size: int,
    function: Callable[..., Any] | str,
    *args: Any,
    limit: float = 120.0,
    start_group: bool = True,
    modules: tuple[str, ...] = MEGATRON,
) -> list[Any]:
    """Call ``function(*args)`` in ``size`` processes of one world.

    Args:
        size: number of processes.
        function: a function of an importable module, such as a test module, or "module:function".
        args: picklable, the same for every rank.
        limit: seconds after which the world is killed.
        start_group: start torch.distributed over gloo before the call. Without it ``function`` starts it from the
            environment, as a program under torchrun does.
        modules: already imported in the processes.

    Returns:
        The (picklable) results, by rank.

    Raises:
        WorldError: a rank raised or was killed, or ``limit`` passed; every process has ended by then.
    """
    # The parent holds the store, as the agent of torchrun does, so that the port is taken as soon as it is chosen.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="world-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, args, limit, start_group)))
        processes: list[Forked] = []
        try:
            for rank in range(size):
                processes.append(_start(rank, size, store.port, folder, modules))
            lost = _wait(processes, time.monotonic() + limit)
        finally:
            _kill(processes)
        if lost:
            raise WorldError(_report(lost, processes, folder, getattr(function, "__qualname__", function)))
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(size)]


def error_of(act: Callable[[], Any]) -> tuple[str, str]:
    """Type and text of the error of ours that ``act`` raises; ("none", "") without one."""
    try:
        act()
    except RlptError as error:
        return type(error).__name__, str(error)
    return "none", ""


def ranks_of_world(timeout: float = 60.0, **layout: int) -> Ranks:
    """This rank of the world of ``run_world``, whose model has this layout."""
    world = torch.distributed.get_world_size()
    return Ranks(torch.distributed.get_rank(), Layout(world=world, **layout), timeout=timeout)


def on_every_rank(found: list[dict[str, Any]], name: str) -> Any:
    """Return the common result of all ranks under ``name``."""
    assert all(one[name] == found[0][name] for one in found), [one[name] for one in found]
    return found[0][name]


def _start(rank: int, size: int, port: int, folder: Path, modules: tuple[str, ...]) -> Forked:
    environment = os.environ | {
        # The worker and its children can import everything that this process can.
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with (folder / f"{rank}.log").open("wb") as log:
        # In a new session, so that the children of a worker can be ended with it.
        return forked(modules, [sys.executable, __file__, str(folder)], env=environment, output=log)


def _wait(processes: list[Forked], deadline: float) -> str:
    """Wait until all ranks have succeeded ("") or one has failed; return the reason."""
    lost = ""
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return "a rank failed" if any(codes) else ""
        if any(codes) and not lost:
            lost, deadline = "a rank failed", min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)  # the worker prints its stack
    time.sleep(0.5)
    return lost or "out of time"


def _kill(processes: list[Forked]) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _report(why: str, processes: list[Forked], folder: Path, name: str) -> str:
    parts = [f"{name} in a world of {len(processes)}: {why}"]
    for rank, process in enumerate(processes):
        if process.returncode != 0:
            how = "still at it" if process.returncode == -signal.SIGKILL else f"exit code {process.returncode}"
            lines = (folder / f"{rank}.log").read_text(errors="replace").splitlines()[-LAST_LINES:]
            parts.append("\n".join([f"--- rank {rank}: {how}", *lines]))
    return "\n".join(parts)


def _work(folder: Path) -> None:
    """The main function of a worker process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    function, args, limit, start_group = pickle.loads((folder / "call").read_bytes())
    if isinstance(function, str):
        module, _, attribute = function.partition(":")
        function = getattr(__import__(module, fromlist=[attribute]), attribute)
    if start_group:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=limit))
    result = function(*args)
    (folder / f"{os.environ['RANK']}.result").write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        _work(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # Not sys.exit: threads of a broken process group could keep the interpreter from exiting.
        os._exit(1)
