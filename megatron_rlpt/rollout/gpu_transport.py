"""Weights to an engine in a process of its own on a GPU, by vLLM's weight-transfer package.

Chosen only where CUDA is there. CUDA IPC serves an engine that shares the trainer's GPU, NCCL one that has its own;
both cut the stream into packed buffers and load them layer by layer (vllm/distributed/weight_transfer). Without a GPU
neither can run: what is checked there is what we build for them, the order of what is sent, and our side of the calls.

Every trainer rank has an engine of its own and is the sender to it: rank 0 in vLLM's terms, where "rank" is among the
trainers of one engine. All ranks send at the same time, because a rank's weights are complete only by collectives of
all; vLLM's IPC engine relies on that (it merges the handles of all ranks, and each engine picks its GPU's).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from megatron_rlpt.errors import EngineError
from megatron_rlpt.rollout.manifest import Manifest, Weights
from megatron_rlpt.rollout.transport import Placement

BACKENDS = {Placement.SHARED_GPU: "ipc", Placement.OWN_GPU: "nccl"}
"""Placement -> backend in vLLM's ``weight_transfer_config``, which the engine is started with."""


class PolicySource(WeightSource):
    """The weights of one update as vLLM's trainer engines take them: declared by the manifest, then streamed once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._weights: Weights | None = None

    def offer(self, weights: Weights) -> None:
        """Let the next pass stream ``weights``."""
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        """Name, precision and shape of every weight, in the order of the stream."""
        return [ParamMeta(name, self._manifest.dtype, shape) for name, shape in self._manifest.shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._weights is None:
            raise EngineError("the weights of an update can be streamed once")
        weights, self._weights = self._weights, None
        yield from self._manifest.in_order(weights)


class OfflineClient:
    """vLLM's ``VLLMWeightSyncClient`` for an offline ``LLM`` in a process of its own."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the worker's end."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Make the worker ready to load."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Let the worker receive; CUDA handles are pickled, because vLLM's own encoding refuses them."""
        self._llm.collective_rpc("rlpt_update_pickled", args=(pickle.dumps(update_info),))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the worker finish; the engine's version is set by its owner, once caches are dropped too."""
        self._llm.finish_weight_update(weight_version)


def trainer_init_info(placement: Placement, manifest: Manifest, bucket_bytes: int) -> TrainerInitInfo:
    """How this rank joins its engine; the rendezvous of NCCL is on this machine, where the engine is too."""
    # One tensor is never divided (packed_tensor.py: packed_ipc_producer refuses one that does not fit).
    bucket_bytes = max(bucket_bytes, manifest.largest_nbytes)
    if placement is Placement.SHARED_GPU:
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=bucket_bytes)
    return NCCLTrainerInitInfo(
        rank=0,
        master_address="127.0.0.1",
        master_port=get_open_port(),
        world_size=2,
        packed=True,
        packed_buffer_size_bytes=bucket_bytes,
    )


class GpuTransport:
    """Sends through one of vLLM's trainer engines.

    Weights are checked as they stream: an error half-way leaves an engine that cannot load again, so the run has to be
    started anew.
    """

    def __init__(self, trainer_engine: Any, source: PolicySource) -> None:
        self._trainer_engine = trainer_engine
        self._source = source

    def send(self, weights: Weights) -> None:
        """See ``Transport.send``."""
        self._source.offer(weights)
        self._trainer_engine.send_weights()


def open_gpu_transport(placement: Placement, llm: Any, manifest: Manifest, bucket_bytes: int) -> GpuTransport:
    """Join ``llm``, which was started with the backend of ``placement``.

    Raises:
        EngineError: CUDA is not available here.
    """
    if not torch.cuda.is_available():
        raise EngineError(f"{BACKENDS[placement]} carries weights between GPUs, and CUDA is not available here")
    source = PolicySource(manifest)
    info = trainer_init_info(placement, manifest, bucket_bytes)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=OfflineClient(llm), source=source)
    return GpuTransport(engine, source)
