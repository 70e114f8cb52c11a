"""Weight transport to an engine in another process: files in shared memory, read by the worker's code."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from megatron_rlpt.errors import EngineError
from megatron_rlpt.rollout.vllm.worker import _read_buckets
from megatron_rlpt.rollout.weight_sync import transport
from megatron_rlpt.rollout.weight_sync.manifest import WeightManifest
from megatron_rlpt.rollout.weight_sync.transport import (
    SHARED_MEMORY,
    InProcessTransport,
    SharedMemoryTransport,
    StreamTransport,
)

SHAPES = {"embed": (16, 8), "norm": (8,), "up": (32, 8), "down": (8, 32)}
MANIFEST = WeightManifest(SHAPES, torch.bfloat16)


class Receiver:
    """A fake of vLLM that records the tensors a worker reads, and shared memory before and after each."""

    def __init__(self, left_over=None):
        self.received = None
        self.held = []
        self.buckets = 0
        self.left_over = left_over

    def collective_rpc(self, method, args):
        assert method in ("rlpt_load", "rlpt_load_buckets")
        weights = args[0]
        if method == "rlpt_load_buckets":
            self.buckets = len(weights)
            weights = _read_buckets(weights)
            self.held.append(sum(open_shared_memory()))
        self.received = {}
        for name, tensor in weights:
            self.received[name] = tensor
            self.held.append(sum(open_shared_memory()))
        return [self.left_over]


def open_shared_memory():
    """Sizes of the files in shared memory that this process holds."""
    sizes = []
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith(str(SHARED_MEMORY)):
                sizes.append(os.stat(f"/proc/self/fd/{number}").st_size)
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return sizes


def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("bucket_bytes", [1, 300, 2**20])
def test_every_weight_arrives_in_the_engine_s_precision(bucket_bytes):
    receiver, sent = Receiver(), weights()
    SharedMemoryTransport(receiver, MANIFEST, bucket_bytes).send(sent.items())
    assert list(receiver.received) == list(SHAPES)
    for name, tensor in receiver.received.items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, sent[name].bfloat16())


def test_shared_memory_holds_the_last_weights_and_no_others():
    receiver = Receiver()
    transport = SharedMemoryTransport(receiver, MANIFEST, bucket_bytes=300)
    for _ in range(2):
        transport.send(weights().items())
        # embed and norm are 272 bytes, up brings the first bucket over its size; down is the second
        assert receiver.buckets == 2
        assert sorted(open_shared_memory()) == [512, 784]
    assert set(receiver.held) == {1296}
    del transport
    gc.collect()
    assert open_shared_memory() == []


def test_an_engine_that_was_started_again_gets_the_weights_of_the_one_before_which_died_of_them():
    class Dead:
        def collective_rpc(self, method, args):
            raise RuntimeError("dead")

    transport, sent = SharedMemoryTransport(Dead(), MANIFEST, bucket_bytes=300), weights()
    untouched = Receiver()
    transport.reconnect(untouched)
    assert untouched.received is None, "it has the weights of the folder"
    transport = SharedMemoryTransport(Dead(), MANIFEST, bucket_bytes=300)
    with pytest.raises(RuntimeError):
        transport.send(sent.items())
    receiver = Receiver()
    transport.reconnect(receiver)
    for name, tensor in receiver.received.items():
        assert torch.equal(tensor, sent[name].bfloat16())


def test_several_workers_read_the_same_buckets():
    class Workers(Receiver):
        def collective_rpc(self, method, args):
            return [*super().collective_rpc(method, args), *super().collective_rpc(method, args)]

    workers = Workers()
    SharedMemoryTransport(workers, MANIFEST, bucket_bytes=300).send(weights().items())
    assert {name: tensor.shape for name, tensor in workers.received.items()} == SHAPES


def test_a_rank_s_part_of_an_engine_gets_the_stream_as_it_comes():
    """Nothing is held: a tensor is loaded before the next one is gathered."""
    receiver, events = Receiver(), []

    def stream():
        for name, tensor in weights().items():
            events.append((name, receiver.received and list(receiver.received)))
            yield name, tensor

    StreamTransport(receiver, MANIFEST).send(stream())
    assert [name for name, _ in events] == list(SHAPES)
    assert events[2][1] == list(SHAPES)[:2]


def missing(sent):
    return [item for item in sent if item[0] != "up"]


def wrong_shape(sent):
    return [(name, tensor[:-1] if name == "down" else tensor) for name, tensor in sent]


def breaks_off(sent):
    yield from sent[:2]
    raise EngineError("rank 3 is absent")


@pytest.mark.parametrize(
    ("damage", "message"), [(missing, "'up'"), (wrong_shape, "'down'"), (breaks_off, "rank 3 is absent")]
)
@pytest.mark.parametrize("way", [InProcessTransport, lambda *given: SharedMemoryTransport(*given, bucket_bytes=300)])
def test_a_wrong_set_of_weights_is_refused_before_the_engine_begins_to_load(damage, message, way):
    receiver = Receiver()
    with pytest.raises(EngineError, match=message):
        way(receiver, MANIFEST).send(damage(list(weights().items())))
    assert receiver.received is None
    assert open_shared_memory() == []


def test_nothing_stays_in_shared_memory_when_the_stream_fails():
    transport = SharedMemoryTransport(Receiver(), MANIFEST, bucket_bytes=300)
    with pytest.raises(EngineError):
        transport.send(breaks_off(list(weights().items())))
    assert open_shared_memory() == []


@pytest.mark.parametrize("way", [InProcessTransport, lambda *given: SharedMemoryTransport(*given, bucket_bytes=300)])
def test_a_weight_that_the_model_leaves_over_is_an_error(way):
    with pytest.raises(EngineError, match="did not take the weight 'down'"):
        way(Receiver(left_over="down"), MANIFEST).send(weights().items())


def test_shared_memory_that_is_too_small_is_named_with_its_size(monkeypatch):
    room = os.statvfs(SHARED_MEMORY)
    small = os.statvfs_result([room.f_bsize, 2**20, 64, 64, 64, *room[5:]])  # docker's default of 64 MiB
    monkeypatch.setattr(transport.os, "statvfs", lambda path: small)
    large, drawn = WeightManifest({"embed": (2**25, 2)}, torch.bfloat16), []
    with pytest.raises(EngineError, match=r"weights are 128 MiB and /dev/shm has 64 MiB free; .*--shm-size"):
        SharedMemoryTransport(Receiver(), large, 300).send(drawn.append(name) for name in SHAPES)
    assert not drawn


def test_random_weights_have_the_manifest_s_shapes_and_repeat():
    first, second = dict(MANIFEST.random(torch.device("cpu"))), dict(MANIFEST.random(torch.device("cpu")))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == SHAPES
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert tensor.unique().numel() > 1


def test_weights_out_of_order_are_refused_where_the_order_counts():
    sent = dict(reversed(weights().items()))
    assert [name for name, _ in MANIFEST.checked(sent.items())] == list(sent)
    with pytest.raises(EngineError, match="'down' was sent where the engine waits for 'embed'"):
        list(MANIFEST.in_order(sent.items()))
