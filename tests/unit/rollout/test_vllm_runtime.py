"""The process state while a vLLM engine starts, and its restoration afterwards."""

from __future__ import annotations

import gc
import os
import random

import pytest
import torch

from megatron_rlpt.rollout.placement import IN_THIS_PROCESS, EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm.runtime import generate_in_one_batch, vllm_environment

APART = EnginePlace(EngineMode.OWN_PROCESS)

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "3",
    "ROLE_NAME": "default",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "3")


@pytest.mark.parametrize("in_process", [True, False])
def test_an_engine_does_not_take_the_trainer_s_world_for_its_own(in_process):
    before = dict(os.environ)
    with vllm_environment(0.1, IN_THIS_PROCESS if in_process else APART):
        assert not TORCHRUN.keys() & os.environ.keys()
        assert os.environ["SLURM_PROCID"] == "3"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == ("0" if in_process else "1")
    assert dict(os.environ) == before


def test_garbage_is_collected_again_also_after_a_model_that_cannot_be_served():
    with pytest.raises(ValueError), vllm_environment(0.1):
        raise ValueError
    assert gc.isenabled()


def test_an_engine_s_process_is_not_a_fork():
    with vllm_environment(0.1, APART):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@pytest.mark.parametrize(
    ("visible", "gpus", "seen"),
    [
        (None, (2,), "2"),
        ("4,5,6,7", (2,), "6"),
        ("GPU-a,GPU-b,GPU-c", (2,), "GPU-c"),
        (None, (4, 5), "4,5"),
        ("4,5,6,7", (2, 3), "6,7"),
    ],
)
def test_an_engine_s_process_sees_its_own_gpus_only(monkeypatch, visible, gpus, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with vllm_environment(0.1, EnginePlace(EngineMode.OWN_GPU, gpus=gpus)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_an_engine_s_process_without_a_gpu_of_its_own_sees_the_one_its_trainer_works_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with vllm_environment(0.1, APART):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    with vllm_environment(0.1):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_on_a_gpu_that_a_policy_has_half_filled_vllm_s_start_up_check_passes(monkeypatch):
    """vLLM's own check and configuration, with the memory of a GPU that is nearly full."""
    from vllm.config.cache import CacheConfig
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.worker.utils import request_memory

    gpu = MemorySnapshot(auto_measure=False)
    gpu.total_memory, gpu.free_memory = 80 * 2**30, 30 * 2**30
    with pytest.raises(ValueError, match="Free memory on device"):
        request_memory(gpu, CacheConfig(kv_cache_memory_bytes=2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with vllm_environment(1.0) as arguments:
        sizes = {name: arguments[name] for name in ("gpu_memory_utilization", "kv_cache_memory_bytes")}
    assert sizes["kv_cache_memory_bytes"] == 2**30
    assert request_memory(gpu, CacheConfig(**sizes)) < gpu.free_memory


def test_graphs_are_replayed_on_gpus_unless_kernels_shall_be_launched_one_by_one(monkeypatch):
    """In vLLM's own configuration: graphs of decoding, without torch.compile."""
    from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode

    with vllm_environment(0.1, eager=False) as arguments:
        assert arguments["enforce_eager"], "a CPU has no graphs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with vllm_environment(0.1, eager=True) as arguments:
        assert arguments["enforce_eager"]
    with vllm_environment(0.1, eager=False) as arguments:
        assert "enforce_eager" not in arguments
        config = CompilationConfig(**arguments["compilation_config"])
    assert (config.mode, config.cudagraph_mode) == (CompilationMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY)
    assert not config.cudagraph_mode.requires_piecewise_compilation()


@pytest.fixture
def ranks(tmp_path):
    """The trainer's ranks, here one."""
    if torch.distributed.is_initialized():  # by a test before, in the same process
        yield
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_an_engine_that_ranks_share_joins_their_world_also_one_that_slurm_started(monkeypatch, ranks):
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    place = EnginePlace(EngineMode.IN_RANKS, tensor=2, rank=3, world=4)
    with vllm_environment(0.1, place) as arguments:
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("3", "4", "3")
        assert (arguments["distributed_executor_backend"], arguments["tensor_parallel_size"]) == (
            "external_launcher",
            2,
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with vllm_environment(0.1, place):
        assert os.environ["LOCAL_RANK"] == "0", "with --gpus-per-task=1 every rank's GPU has index 0"
    assert "RANK" not in os.environ


def start_and_fail():
    with vllm_environment(0.1):
        random.random()
        torch.rand(1)
        torch.set_num_threads(1)
        torch.set_num_threads = None
        raise RuntimeError


def test_random_state_and_threads_are_as_before_also_after_a_failure():
    python, numbers, threads = random.getstate(), torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(RuntimeError):
        start_and_fail()
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.get_num_threads() == threads


class JournalLlm:
    """The part of a separate engine process that ``generate_in_one_batch`` uses."""

    def __init__(self, fails: bool = False) -> None:
        self.journal: list[object] = []
        self.llm_engine = self.engine_core = self
        self._fails = fails

    def call_utility(self, *arguments):
        self.journal.append(arguments)

    def enqueue(self, prompts, parameters, use_tqdm):
        self.journal.append(("enqueue", list(prompts)))
        if self._fails:
            raise ValueError("too long")

    def wait_for_completion(self, use_tqdm):
        self.journal.append("wait")
        return ["an output"]


def test_an_engine_in_another_process_begins_when_all_requests_are_there():
    llm = JournalLlm()
    assert generate_in_one_batch(llm, ["a", "b"], [1, 2]) == ["an output"]
    pause = ("pause_scheduler", "keep", False)
    assert llm.journal == [pause, ("enqueue", ["a", "b"]), ("resume_scheduler",), "wait"]


def test_an_engine_does_not_stay_paused_when_a_request_is_refused():
    llm = JournalLlm(fails=True)
    with pytest.raises(ValueError, match="too long"):
        generate_in_one_batch(llm, ["a"], [1])
    assert llm.journal[-1] == ("resume_scheduler",)
