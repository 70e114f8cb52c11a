"""Names of the shared memory of an engine whose workers run in the trainer's ranks, on a CPU.

vLLM's workers on a CPU sum through files in ``/dev/shm``. Where an engine joins processes that others have started, it
takes their names from ``env://``, so they are the same in every run of a machine, and they stay when a run ends
(vllm/v1/worker/cpu_worker.py: init_device, and device_communicators/cpu_communicator.py: make_group_name). The next run
would be refused, and so would one beside it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = Path("/dev/shm")


@contextmanager
def own_shared_memory() -> Iterator[None]:
    """Give an engine that is built in the ranks names of its own, and remove them once all have opened the files.

    All ranks call it together.
    """
    from torch import distributed
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    shared = [f"rlpt-{uuid.uuid4().hex}"]
    distributed.broadcast_object_list(shared, src=0)
    name = shared[0]
    unnamed = ExecutorWithExternalLauncher._distributed_args

    def named(executor: ExecutorWithExternalLauncher) -> tuple[str, int, int]:
        method, rank, local_rank = unnamed(executor)
        return f"{method}{name}", rank, local_rank  # torch does not read it: the ranks are connected already

    ExecutorWithExternalLauncher._distributed_args = named
    try:
        yield
    finally:
        ExecutorWithExternalLauncher._distributed_args = unnamed
        # vLLM has waited for every rank to open them; memory that is open needs no name.
        for left in _FOLDER.glob(f"{name}-*"):
            left.unlink(missing_ok=True)
