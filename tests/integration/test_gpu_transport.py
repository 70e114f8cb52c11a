"""Weight transfer with the real classes of vLLM, as far as possible without a GPU."""

from __future__ import annotations

import types

import pytest
import torch
from vllm.distributed.weight_transfer import ipc_engine
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk, pack_tensors, unpack_tensor
from vllm.v1.engine.exceptions import EngineDeadError

from megatron_rlpt.errors import EngineError
from megatron_rlpt.rollout.placement import EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm.worker import WorkerExtension
from megatron_rlpt.rollout.weight_sync.gpu_transport import (
    BACKENDS,
    SENDERS,
    GpuTransport,
    OfflineClient,
    PolicySource,
    SingleRankIpcSender,
    open_gpu_transport,
    trainer_init_info,
)
from megatron_rlpt.rollout.weight_sync.manifest import WeightManifest

SHAPES = {"embed": (16, 8), "norm": (8,), "up": (32, 8)}
MANIFEST = WeightManifest(SHAPES, torch.bfloat16)


def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Worker(WorkerExtension):
    """A worker that parses its messages like that of vLLM (gpu_worker.py)."""

    def __init__(self, engine_class):
        self.parsed = engine_class.__new__(engine_class)
        self.calls = []

    def init_weight_transfer_engine(self, init_info):
        self.calls.append(("init", self.parsed.parse_init_info(init_info)))

    def start_weight_update(self):
        self.calls.append(("start", None))

    def update_weights(self, update_info):
        self.calls.append(("update", self.parsed.parse_update_info(update_info)))

    def finish_weight_update(self):
        self.calls.append(("finish", None))


class Llm:
    """``LLM`` with one worker; the methods are those of vllm/entrypoints/rl/offline.py."""

    def __init__(self, worker):
        self.worker = worker

    def collective_rpc(self, method, args=()):
        return [getattr(self.worker, method)(*args)]

    def init_weight_transfer_engine(self, request):
        self.worker.init_weight_transfer_engine(request["init_info"])

    def start_weight_update(self):
        self.worker.start_weight_update()

    def finish_weight_update(self, weight_version=None):
        self.worker.finish_weight_update()


def test_the_stream_is_what_was_declared_and_runs_once():
    source, sent = PolicySource(MANIFEST), weights()
    source.offer(sent.items())
    # vLLM's own check of the stream against its declaration
    received = dict(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    for name, tensor in received.items():
        assert torch.equal(tensor, sent[name].bfloat16())
    assert list(received) == list(SHAPES)
    with pytest.raises(EngineError, match="streamed once"):
        next(iter(source))


def test_a_stream_in_another_order_stops_before_the_wrong_weight_is_sent():
    source, sent = PolicySource(MANIFEST), weights()
    source.offer([("embed", sent["embed"]), ("up", sent["up"]), ("norm", sent["norm"])])
    stream = iter(source)
    assert next(stream)[0] == "embed"
    with pytest.raises(EngineError, match="'up' was sent where the engine waits for 'norm'"):
        next(stream)


def test_packed_buffers_carry_the_weights_bit_for_bit():
    source = PolicySource(MANIFEST)
    source.offer(weights().items())
    stream, received = iter(source), {}
    while chunk := pack_tensors(stream, lambda item: item[1], buffer_size_bytes=100):
        received |= unpack_tensor(chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes)
    for name, tensor in weights().items():
        assert torch.equal(received[name], tensor.bfloat16())


def test_the_largest_weight_fits_a_buffer_that_is_set_smaller():
    info = trainer_init_info(EnginePlace(EngineMode.SHARED_GPU), MANIFEST, bucket_bytes=100)
    assert info.packed_buffer_size_bytes == 32 * 8 * 2
    assert trainer_init_info(EnginePlace(EngineMode.SHARED_GPU), MANIFEST, 2**20).packed_buffer_size_bytes == 2**20


@pytest.mark.parametrize("mode", [EngineMode.SHARED_GPU, EngineMode.OWN_GPU])
def test_vllm_knows_the_backend_on_both_sides_and_every_rank_sends_to_its_own_engine(mode):
    info = trainer_init_info(EnginePlace(mode), MANIFEST, 2**20)
    assert info.backend == BACKENDS[mode]
    assert info.is_sender
    assert info.packed
    assert info.backend in WeightTransferEngineFactory._registry
    assert issubclass(SENDERS[mode], WeightTransferTrainerFactory._registry[info.backend]())


def test_two_ranks_of_one_machine_meet_their_engines_at_different_ports():
    one, two = (trainer_init_info(EnginePlace(EngineMode.OWN_GPU), MANIFEST, 2**20) for _ in range(2))
    assert (one.master_address, one.world_size) == ("127.0.0.1", 2)
    assert one.master_port != two.master_port


def test_an_engine_over_several_gpus_is_one_receiver_per_gpu():
    info = trainer_init_info(EnginePlace(EngineMode.OWN_GPU, tensor=4), MANIFEST, 2**20)
    assert (info.rank, info.world_size) == (0, 5)


def test_the_worker_understands_an_ipc_update_with_handles_in_it():
    worker = Worker(IPCWeightTransferEngine)
    client = OfflineClient(Llm(worker))
    assert isinstance(client, VLLMWeightSyncClient)
    handle = {"GPU-1": (torch.Tensor, torch.Size([4]), torch.UntypedStorage, torch.uint8, 0, b"handle")}
    update = {"names": ["norm"], "dtype_names": ["bfloat16"], "shapes": [[8]], "ipc_handles": handle}
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    client.update_weights(update | {"tensor_sizes": [16]})
    client.finish_weight_update()
    assert [call for call, _ in worker.calls] == ["init", "start", "update", "finish"]
    assert worker.calls[0][1].packed
    assert worker.calls[2][1] == IPCWeightTransferUpdateInfo(**update, tensor_sizes=[16])


def test_the_worker_understands_an_nccl_update():
    worker = Worker(NCCLWeightTransferEngine)
    update = {"names": ["norm"], "dtype_names": ["bfloat16"], "shapes": [[8]]}
    OfflineClient(Llm(worker)).update_weights(update)
    assert worker.calls == [("update", NCCLWeightTransferUpdateInfo(**update))]


def test_an_update_reaches_vllm_s_trainer_engine_whole():
    source, received = PolicySource(MANIFEST), []

    class Engine:
        def send_weights(self):
            received.extend(name for name, _ in source)

    GpuTransport(Engine(), source).send(weights().items())
    assert received == list(SHAPES)


@pytest.mark.parametrize("error", [Exception("Call to update_weights failed\nmore"), RuntimeError("CUDA error")])
def test_a_failure_in_vllm_s_worker_is_an_error_that_the_other_ranks_are_told_of(error):
    class Engine:
        def send_weights(self):
            raise error

    with pytest.raises(EngineError, match=r"did not take the weights \((Call to update_weights failed|CUDA error)\);"):
        GpuTransport(Engine(), PolicySource(MANIFEST)).send(weights().items())


def test_the_death_of_the_engine_s_process_is_left_to_whoever_watches_it():
    class Engine:
        def send_weights(self):
            raise EngineDeadError

    with pytest.raises(EngineDeadError):
        GpuTransport(Engine(), PolicySource(MANIFEST)).send(weights().items())


def test_a_rank_sends_by_ipc_without_waiting_for_any_other(monkeypatch):
    """The real sender of vLLM, with main memory instead of a GPU's, in a world of two whose other rank has exited."""

    def refuse(*args, **kwargs):
        raise AssertionError("a rank that failed would never come here")

    for name in ("all_gather_object", "barrier", "all_gather", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    collected = []
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: collected.append(1))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="GPU-1"))

    def producer(iterator, gpu_uuid, post_iter_func, buffer_size_bytes):
        while chunk := pack_tensors(iterator, post_iter_func, 100):
            names = [str(dtype).removeprefix("torch.") for dtype in chunk.dtypes]
            handle = {gpu_uuid: (chunk.packed_tensor,)}
            yield PackedIpcChunk(chunk.names, chunk.shapes, names, chunk.tensor_sizes, handle)

    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", producer)
    source, worker = PolicySource(MANIFEST), Worker(IPCWeightTransferEngine)
    info = trainer_init_info(EnginePlace(EngineMode.SHARED_GPU), MANIFEST, 2**20)
    sender = SingleRankIpcSender.trainer_init(info, client=OfflineClient(Llm(worker)), source=source)
    GpuTransport(sender, source).send(weights().items())

    updates = [update for call, update in worker.calls if call == "update"]
    assert [call for call, _ in worker.calls] == ["init", "start", *["update"] * len(updates), "finish"]
    assert len(updates) > 1
    assert [name for update in updates for name in update.names] == list(SHAPES)
    assert {gpu for update in updates for gpu in update.ipc_handles} == {"GPU-1"}
    assert len(collected) == len(updates) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("mode", BACKENDS)
def test_without_a_gpu_the_error_says_so(mode):
    with pytest.raises(EngineError, match="CUDA is not available here"):
        open_gpu_transport(EnginePlace(mode), None, MANIFEST, 2**20)
