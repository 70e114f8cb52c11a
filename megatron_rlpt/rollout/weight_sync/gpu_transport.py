"""Weight transport to an engine in a separate process on a GPU, through vLLM's weight-transfer package.

Used only with CUDA. CUDA IPC serves an engine that shares the trainer's GPU, NCCL an engine on its own GPU. Both split
the stream into packed buffers and load them layer by layer (vllm/distributed/weight_transfer). Neither runs without a
GPU; tests without one check the constructed objects, the order of the stream, and the calls on the trainer's side.

Every trainer rank sends to its own engine and is rank 0 in vLLM's terms, where "rank" counts the trainers of one
engine. All ranks send concurrently, because a rank's weights are only complete through collectives of all ranks.
Sending adds no further collectives, so a rank whose engine fails can finish the stream and let the others continue
(``DistributedEngine``).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.v1.engine.exceptions import EngineDeadError

from megatron_rlpt.distributed.addresses import free_port
from megatron_rlpt.errors import EngineError, RlptError, first_line
from megatron_rlpt.rollout.placement import EngineMode, EnginePlace
from megatron_rlpt.rollout.weight_sync.manifest import WeightManifest, Weights

BACKENDS = {EngineMode.SHARED_GPU: "ipc", EngineMode.OWN_GPU: "nccl"}
"""EngineMode -> backend in vLLM's ``weight_transfer_config``."""


class PolicySource(WeightSource):
    """The weights of one update for vLLM's trainer engines: declared by the manifest, then streamed once."""

    def __init__(self, manifest: WeightManifest) -> None:
        self._manifest = manifest
        self._weights: Weights | None = None

    def offer(self, weights: Weights) -> None:
        """Set the weights that the next iteration streams."""
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        """Return name, precision and shape of every weight, in the order of the stream."""
        return [ParamMeta(name, self._manifest.dtype, shape) for name, shape in self._manifest.shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._weights is None:
            raise EngineError("the weights of an update can be streamed once")
        weights, self._weights = self._weights, None
        for item in self._manifest.in_order(weights):
            # vLLM packs tensors on streams of its own, which do not wait for the stream that writes or gathers them.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            yield item


class OfflineClient:
    """vLLM's ``VLLMWeightSyncClient`` for an offline ``LLM`` in a separate process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the worker's side."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Prepare the worker for loading."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Let the worker receive; CUDA handles are pickled because vLLM cannot encode them."""
        self._llm.collective_rpc("rlpt_update_pickled", args=(pickle.dumps(update_info),))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the worker finish; ``VllmEngine`` sets the version once caches are dropped."""
        self._llm.finish_weight_update(weight_version)


class SingleRankIpcSender(IPCTrainerWeightTransferEngine):
    """vLLM's IPC sender for one trainer and one engine on one GPU, without collectives over the other ranks.

    vLLM's class treats all ranks of torch's default group as trainers of the same engine: for every buffer it gathers
    their handles and waits for them, so one failing rank would leave all others waiting.
    """

    def _all_gather_and_merge_handles(self, handles: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return ``handles``: the engine only needs the handle of its own GPU."""
        return handles

    @staticmethod
    def _post_send_sync() -> None:
        """Free buffers that the engine has closed.

        It has read them by now: its worker waits for its GPU before an update returns
        (vllm/distributed/weight_transfer/base.py: WeightTransferEngine.update_weights).
        """
        torch.cuda.ipc_collect()


SENDERS: dict[EngineMode, type[TrainerWeightTransferEngine[Any]]] = {
    EngineMode.SHARED_GPU: SingleRankIpcSender,
    EngineMode.OWN_GPU: NCCLTrainerWeightTransferEngine,
}
"""EngineMode -> the trainer's side of the backend. The NCCL sender shares a group only with its engine."""


def trainer_init_info(place: EnginePlace, manifest: WeightManifest, bucket_bytes: int) -> TrainerInitInfo:
    """Return how this rank joins its engine; NCCL's rendezvous is on this machine, like the engine."""
    # A tensor is never split (packed_tensor.py: packed_ipc_producer refuses one that does not fit).
    bucket_bytes = max(bucket_bytes, manifest.largest_nbytes)
    if place.mode is EngineMode.SHARED_GPU:
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=bucket_bytes)
    return NCCLTrainerInitInfo(
        rank=0,
        master_address="127.0.0.1",
        master_port=free_port(),
        world_size=1 + place.tensor,
        packed=True,
        packed_buffer_size_bytes=bucket_bytes,
    )


class GpuTransport:
    """Sends through one of vLLM's trainer engines.

    Weights are checked while they stream: an error in the middle leaves an engine that cannot load again, so the run
    has to be resumed.
    """

    def __init__(self, trainer_engine: Any, source: PolicySource) -> None:
        self._trainer_engine = trainer_engine
        self._source = source

    def send(self, weights: Weights) -> None:
        """Send ``weights`` to the engine, as ``transport.Transport.send``."""
        self._source.offer(weights)
        try:
            self._trainer_engine.send_weights()
        except (RlptError, EngineDeadError):
            raise
        except Exception as error:  # vLLM reports a failure in its worker as a plain Exception
            raise EngineError(
                f"the rollout engine did not take the weights ({first_line(error)}); run the same command to resume "
                "from the last checkpoint"
            ) from error


def open_gpu_transport(place: EnginePlace, llm: Any, manifest: WeightManifest, bucket_bytes: int) -> GpuTransport:
    """Connect to ``llm``, which was started with the backend of ``place.mode``.

    Raises:
        EngineError: CUDA is not available here.
    """
    if not torch.cuda.is_available():
        raise EngineError(f"{BACKENDS[place.mode]} carries weights between GPUs, and CUDA is not available here")
    source = PolicySource(manifest)
    info = trainer_init_info(place, manifest, bucket_bytes)
    return GpuTransport(SENDERS[place.mode].trainer_init(info, client=OfflineClient(llm), source=source), source)
