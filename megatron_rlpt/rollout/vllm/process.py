"""The separate process of an engine: its death becomes an error for every caller, and it ends with the trainer."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import InvalidStateError
from multiprocessing.connection import wait
from typing import Any

from megatron_rlpt.distributed.processes import STOP_SIGNALS
from megatron_rlpt.errors import EngineLostError

_KILLS = (-signal.SIGKILL.value, -signal.SIGTERM.value)
"""Exit codes of a process that was killed, by a user or for lack of memory, and did not fail itself."""


class EngineProcess:
    """Watches the process behind an offline ``LLM`` that was started with multiprocessing."""

    def __init__(self, llm: Any, name: str) -> None:
        """Start watching, and make the process end when this one ends, however that happens.

        Args:
            llm: started with ``worker.WorkerExtension``.
            name: its name in errors.

        Raises:
            EngineLostError: the process ended meanwhile.
        """
        self._name = name
        client = llm.llm_engine.engine_core
        self._processes = client.resources.engine_manager.processes
        # The objects that callers wait on. When the process dies silently, vLLM marks it as dead but wakes no caller
        # (vllm/v1/engine/core_client.py: SyncMPClient.get_output, call_utility).
        watched = (client.resources, client.outputs_queue, client.utility_results, list(self._processes))
        threading.Thread(target=_wake_callers_at_death, args=watched, name="engine-watch", daemon=True).start()
        alone = llm.llm_engine.vllm_config.parallel_config.world_size == 1
        with self.calling():
            llm.collective_rpc("rlpt_exit_with", args=(os.getpid() if alone else None,))
        # The process ignores SIGTERM by now, so do not wait for it as vLLM would.
        weakref.finalize(llm, client.shutdown, timeout=0.0)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Wrap a call to the engine.

        Raises:
            EngineLostError: the process ended before or during the call.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            raise EngineLostError(
                f"the process of {self._name} ended (exit code {self.exit_codes()}; -9 is often a lack of memory); run "
                "the same command to resume from the last checkpoint"
            ) from None

    @property
    def has_ended(self) -> bool:
        """Whether a process of the engine has ended."""
        return any(process.exitcode is not None for process in self._processes)

    def exit_codes(self) -> str:
        """Return the exit codes of the engine's processes; None for one that still runs after some seconds."""
        return ", ".join(str(_exit_code(process)) for process in self._processes)

    @property
    def was_killed(self) -> bool:
        """Whether a process of the engine was killed and did not fail itself."""
        return any(process.exitcode in _KILLS for process in self._processes)

    def end(self) -> None:
        """Kill the process; its state can no longer be used."""
        for process in self._processes:
            process.kill()


def was_killed_at_start(error: Exception) -> bool:
    """Whether vLLM says that a process of an engine was killed while it started (vllm/v1/engine/utils.py)."""
    found = re.search(r"Failed core proc\(s\): \{[^}]*: (-[0-9]+)", str(error))
    return found is not None and int(found[1]) in _KILLS


def ignore_stop_signals() -> None:
    """Ignore the signals that ask a run to stop; call it in the main thread.

    A scheduler signals every process of a job, but the trainer still needs this engine for its last step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_with_parent(parent: int | None = None) -> None:
    """Exit when the parent process exits.

    Args:
        parent: its number, if the caller knows it; it may have ended by now.
    """
    expected = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == expected:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _exit_code(process: Any) -> int | None:
    """Return the exit code of ``process``; None if it still runs after some seconds.

    If two threads call this concurrently, the system reports the code to one of them, and the other sees None until the
    first has stored it (multiprocessing/popen_fork.py: poll).
    """
    for _ in range(50):
        process.join(0.1)
        if process.exitcode is not None:
            break
        time.sleep(0.05)
    return process.exitcode


def _wake_callers_at_death(resources: Any, outputs: Any, results: dict[int, Any], processes: list[Any]) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    wait([process.sentinel for process in processes])
    # In this order: a call registers its future and then checks engine_dead, so it notices one or the other.
    resources.engine_dead = True
    outputs.put_nowait(EngineDeadError())
    for future in list(results.values()):
        with contextlib.suppress(InvalidStateError):
            future.set_exception(EngineDeadError())
