"""A second process that reads weights from one bucket of the first's memory: CUDA IPC on a GPU, shared memory on a CPU.

This is the mechanism below vLLM's IPC transfer (``rollout/weight_sync/gpu_transport.py``), measured where vLLM is not
installed.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import multiprocessing

Place = tuple[str, torch.dtype, torch.Size, int]
"""A tensor in the bucket: name, precision, shape, first byte."""
_ALIGNMENT = 256
_PATIENCE = 120.0


class Receiver:
    """The second process; it keeps a copy of every tensor on the same device."""

    def __init__(self, bucket_bytes: int) -> None:
        """Start it, and share a bucket of ``bucket_bytes`` with it."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._bucket = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_receive, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._ours.send(self._bucket)  # as a handle: torch registers how tensors are sent between processes
        self._answer()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()

    def send(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send all weights, bucket by bucket; each is copied by the receiver before the next is written."""
        places: list[Place] = []
        used = 0
        for name, tensor in weights:
            if used + tensor.nbytes > len(self._bucket):
                self._flush(places)
                places, used = [], 0
            place = self._bucket[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.detach())
            places.append((name, tensor.dtype, tensor.shape, used))
            used += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._flush(places)

    def digests(self) -> dict[str, str]:
        """Return name -> SHA-256 of the receiver's copies."""
        self._ours.send(None)
        return self._answer()

    def _flush(self, places: list[Place]) -> None:
        if self._bucket.is_cuda:
            torch.cuda.synchronize()  # the receiver's stream knows nothing of ours
        self._ours.send(places)
        self._answer()

    def _answer(self) -> Any:
        if not self._ours.poll(_PATIENCE):
            raise RuntimeError(f"the receiving process said nothing for {_PATIENCE:.0f} s")
        try:
            worked, value = self._ours.recv()
        except EOFError:
            self._process.join(10.0)
            raise RuntimeError(f"the receiving process ended with {self._process.exitcode}") from None
        if not worked:
            raise RuntimeError(f"the receiving process failed: {value}")
        return value


def digests(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return name -> SHA-256 of every tensor."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()).hexdigest()
        for name, tensor in weights
    }


def _receive(connection: Any) -> None:
    """Copy tensors out of the bucket until the sender closes; None asks for digests."""
    try:
        bucket = connection.recv()
        connection.send((True, None))
        copies: dict[str, torch.Tensor] = {}
        for places in _requests(connection):
            if places is None:
                connection.send((True, digests(copies.items())))
                continue
            for name, dtype, shape, first in places:
                if name not in copies:
                    copies[name] = torch.empty(shape, dtype=dtype, device=bucket.device)
                nbytes = copies[name].nbytes
                copies[name].copy_(bucket[first : first + nbytes].view(dtype).view(shape))
            if bucket.is_cuda:
                torch.cuda.synchronize()
            connection.send((True, None))
    except Exception:  # the sender reports it
        connection.send((False, traceback.format_exc().strip().splitlines()[-1]))


def _requests(connection: Any) -> Iterator[list[Place] | None]:
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return
