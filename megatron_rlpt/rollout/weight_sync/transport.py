"""Weight transport to vLLM's worker.

    engine                       transport      memory besides policy and engine
    in this process              the iterator   the query, key and value weights of all layers once
    own process, no GPU          shared memory  the model once, and one bucket
    own process, shares a GPU    CUDA IPC       one bucket on the GPU
    own process, GPU of its own  NCCL           two buckets on either GPU

In this process the engine gets the policy's own tensors, except that query, key and value, which Megatron interleaves
in one tensor, are copied to separate them and held until the engine has taken them all. (A policy in another precision
than the engine's would be copied whole; in a run the two are the same.)

Every transport checks weights against the manifest. The first two check all of them before the engine starts to load,
because vLLM cannot recover from a reload that failed in the middle.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import IO, Any, Protocol

from typing_extensions import override

from megatron_rlpt.errors import EngineError
from megatron_rlpt.rollout.placement import EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm.worker import BucketFile, bytes_of
from megatron_rlpt.rollout.weight_sync.manifest import WeightManifest, Weights

_log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


class Transport(Protocol):
    """Sends one complete set of weights at a time."""

    def send(self, weights: Weights) -> None:
        """Replace all weights of the engine by ``weights``.

        Raises:
            EngineError: they differ from the manifest, memory is insufficient, or the engine did not take them all.
                The engine's weights are then undefined.
        """
        ...


def open_transport(place: EnginePlace, llm: Any, manifest: WeightManifest, bucket_bytes: int) -> Transport:
    """Open the transport to ``llm``, an engine in ``place``, with buckets of at most ``bucket_bytes``."""
    _log.info("rollout engine runs %s", place.mode.value)
    if place.mode is EngineMode.IN_PROCESS:
        return InProcessTransport(llm, manifest)
    if place.mode is EngineMode.IN_RANKS:
        return StreamTransport(llm, manifest)
    if place.mode is EngineMode.OWN_PROCESS:
        return SharedMemoryTransport(llm, manifest, bucket_bytes)
    from megatron_rlpt.rollout.weight_sync.gpu_transport import open_gpu_transport

    return open_gpu_transport(place, llm, manifest, bucket_bytes)


class InProcessTransport(Transport):
    """Passes the policy's tensors to an engine in this process."""

    def __init__(self, llm: Any, manifest: WeightManifest) -> None:
        self._llm = llm
        self._manifest = manifest

    @override
    def send(self, weights: Weights) -> None:
        checked = list(self._manifest.checked(weights))
        _require_all_taken(self._llm.collective_rpc("rlpt_load", args=(iter(checked),)))


class StreamTransport(Transport):
    """Passes tensors as they come to this rank's part of an engine that ranks share.

    vLLM's loaders take the rank's part out of each whole tensor, so a rank holds one bucket of the stream besides. A
    stream that fails in the middle leaves an engine that cannot load again, so the run has to be resumed.
    """

    def __init__(self, llm: Any, manifest: WeightManifest) -> None:
        self._llm = llm
        self._manifest = manifest

    @override
    def send(self, weights: Weights) -> None:
        _require_all_taken(self._llm.collective_rpc("rlpt_load", args=(self._manifest.checked(weights),)))


class SharedMemoryTransport(Transport):
    """Writes bucket files into shared memory, which the engine's process reads one at a time.

    The files are unnamed: workers open them through this process's descriptors, so they are private and disappear with
    this process however it ends. They are kept until the next weights, for an engine that has to be started again.
    """

    def __init__(self, llm: Any, manifest: WeightManifest, bucket_bytes: int, folder: Path = SHARED_MEMORY) -> None:
        self._llm = llm
        self._manifest = manifest
        self._bucket_bytes = bucket_bytes
        self._folder = folder
        self._files = contextlib.ExitStack()
        self._buckets: list[BucketFile] = []

    @override
    def send(self, weights: Weights) -> None:
        self._forget()
        self._require_room()
        try:
            self._buckets = self._write(weights, self._files)
        except BaseException:
            self._forget()
            raise
        self._load()

    def reconnect(self, llm: Any) -> None:
        """Send the last weights again, to an engine that was started in place of the one before."""
        self._llm = llm
        if self._buckets:
            self._load()

    def _load(self) -> None:
        _require_all_taken(self._llm.collective_rpc("rlpt_load_buckets", args=(self._buckets,)))

    def _forget(self) -> None:
        self._buckets = []
        self._files.close()

    def _write(self, weights: Weights, files: contextlib.ExitStack) -> list[BucketFile]:
        buckets: list[BucketFile] = []
        file: IO[bytes] | None = None
        for name, tensor in self._manifest.checked(weights):
            if file is None or file.tell() >= self._bucket_bytes:
                file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
                files.enter_context(file)
                buckets.append({"path": f"/proc/{os.getpid()}/fd/{file.fileno()}", "tensors": []})
            data = memoryview(bytes_of(tensor))
            try:
                while data:  # a single write takes 2 GiB at most
                    data = data[file.write(data) :]
            except OSError as error:
                raise EngineError(f"weights cannot be written to {self._folder}: {error}; free space there") from error
            dtype = str(tensor.dtype).removeprefix("torch.")
            buckets[-1]["tensors"].append((name, dtype, list(tensor.shape)))
        return buckets

    def _require_room(self) -> None:
        room = os.statvfs(self._folder)
        free, needed = room.f_bavail * room.f_frsize, self._manifest.nbytes
        if free < needed:
            raise EngineError(
                f"the weights are {needed / 2**20:.0f} MiB and {self._folder} has {free / 2**20:.0f} MiB free; enlarge "
                "it (docker run --shm-size, or mount -o remount,size=...) or train with a single process"
            )


def _require_all_taken(left_over: list[str | None]) -> None:
    for name in left_over:
        if name is not None:
            raise EngineError(f"vLLM did not take the weight {name!r}; its model differs from the policy's")
