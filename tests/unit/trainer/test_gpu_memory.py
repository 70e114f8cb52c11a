"""Engine and optimizer state take turns on a GPU; a fake counts its memory."""

from __future__ import annotations

import pytest

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import EngineError
from megatron_rlpt.trainer.gpu_memory import GpuMemory

GIB = 2**30


class Gpu:
    """A GPU of 80 GiB with an engine and a policy; ``events`` records the calls in order."""

    def __init__(self, engine=20, optimizer=30, gives_back=1.0, grows=0):
        self.events = []
        self.free = (80 - engine - optimizer) * GIB
        self.asleep = False
        self.sleep_frees_bytes = engine * GIB
        self.optimizer = optimizer * GIB
        self.offloaded = False
        self.gives_back = gives_back
        self.grows = grows * GIB

    def sleep(self):
        self.events.append("sleep")
        self.asleep = True
        self.free += int(self.gives_back * self.sleep_frees_bytes)

    def wake(self):
        """Do what the next weight update does."""
        self.events.append("wake")
        self.asleep = False
        self.free -= self.sleep_frees_bytes

    def offload_optimizer(self):
        if not self.offloaded:
            self.events.append("offload")
            self.free += self.optimizer
        self.offloaded = True

    def restore_optimizer(self):
        if self.offloaded:
            self.events.append("restore")
            self.free -= self.optimizer
        self.offloaded = False

    def update(self):
        self.events.append("update")
        self.free -= self.grows

    def step(self, gpu_memory):
        with gpu_memory.generating():
            self.events.append("generate")
        with gpu_memory.training():
            self.update()
        self.wake()


def test_the_engine_sleeps_while_the_policy_trains_and_the_optimizer_is_away_while_it_generates():
    gpu = Gpu()
    gpu_memory = GpuMemory(gpu, gpu, Ranks(), lambda: gpu.free)
    gpu.step(gpu_memory)
    assert gpu.events == ["offload", "generate", "sleep", "restore", "update", "offload", "wake"]
    gpu.events.clear()
    gpu.step(gpu_memory)
    assert gpu.events == ["generate", "sleep", "restore", "update", "offload", "wake"]


def test_without_offloading_the_optimizer_stays():
    gpu = Gpu()
    gpu.step(GpuMemory(gpu, None, Ranks(), lambda: gpu.free))
    assert gpu.events == ["generate", "sleep", "update", "wake"]


def test_where_nothing_is_shared_nothing_moves():
    gpu = Gpu()
    gpu.step(GpuMemory(None, None, Ranks()))
    assert gpu.events == ["generate", "update", "wake"]


def test_an_engine_that_keeps_its_memory_is_an_error_with_figures():
    gpu = Gpu(gives_back=0.5)
    with (
        pytest.raises(EngineError, match=r"gave back 10\.00 GiB .* less than its 20\.00 GiB"),
        GpuMemory(gpu, gpu, Ranks(), lambda: gpu.free).training(),
    ):
        gpu.update()
    assert "update" not in gpu.events


@pytest.mark.parametrize(("offload", "fix"), [(False, "set optimizer.offload=true, lower"), (True, "free; lower")])
def test_too_little_memory_to_wake_up_is_an_error_before_the_engine_tries(offload, fix):
    gpu = Gpu(grows=45 if not offload else 75)
    with (
        pytest.raises(EngineError, match=r"needs 20\.00 GiB .* to wake up, and 5\.00 GiB are free; .*") as raised,
        GpuMemory(gpu, gpu if offload else None, Ranks(), lambda: gpu.free).training(),
    ):
        gpu.update()
    assert fix in str(raised.value)


def test_an_engine_that_sleeps_already_promises_nothing_more():
    gpu = Gpu()
    gpu_memory = GpuMemory(gpu, gpu, Ranks(), lambda: gpu.free)
    for _ in range(2):  # an update that failed half-way, and the next one, without weights in between
        with gpu_memory.training():
            gpu.update()
    assert gpu.events.count("sleep") == 1
