"""The process of an engine that does not run in ours: its death becomes an error for whoever waits for an answer."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import InvalidStateError
from multiprocessing.connection import wait
from typing import Any

from megatron_rlpt.errors import EngineError


class EngineProcess:
    """Watches the process behind an offline ``LLM`` that was started with multiprocessing."""

    def __init__(self, llm: Any, name: str) -> None:
        """Begin to watch, and make the process end when this one does, however that happens.

        Args:
            llm: started with our worker extension.
            name: what errors call it.
        """
        self._name = name
        client = llm.llm_engine.engine_core
        self._processes = client.resources.engine_manager.processes
        # What a caller waits on. When the process dies without a word, vLLM marks it as dead and wakes nobody
        # (vllm/v1/engine/core_client.py: SyncMPClient.get_output, call_utility).
        watched = (client.resources, client.outputs_queue, client.utility_results, list(self._processes))
        threading.Thread(target=_wake_callers_at_death, args=watched, name="engine-watch", daemon=True).start()
        llm.collective_rpc("rlpt_exit_with", args=(os.getpid(),))
        # It takes no SIGTERM any more, which vLLM would send and then wait.
        weakref.finalize(llm, client.shutdown, timeout=0.0)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around every call to the engine.

        Raises:
            EngineError: the process had ended, or ended during the call.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            codes = ", ".join(str(_exit_code(process)) for process in self._processes)
            raise EngineError(
                f"the process of {self._name} ended (exit code {codes}; -9 is often a lack of memory); start the "
                "run again, it goes on from the last checkpoint"
            ) from None

    def end(self) -> None:
        """End the process, because what it holds is of no use any more."""
        for process in self._processes:
            process.kill()


def _exit_code(process: Any) -> int | None:
    """How ``process`` ended; None if it has not after some seconds.

    Two threads may ask at once. Only one of them is told by the system, and the other sees None until that one has
    written it down (multiprocessing/popen_fork.py: poll).
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
    # In this order: a call registers its future, then looks at the mark, so it meets the one or the other.
    resources.engine_dead = True
    outputs.put_nowait(EngineDeadError())
    for future in list(results.values()):
        with contextlib.suppress(InvalidStateError):
            future.set_exception(EngineDeadError())
