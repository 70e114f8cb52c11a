from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from llamas import load_llama, make_examples, make_policy, save_llama

from megatron_rlpt.distributed.ranks import LauncherEnvironment
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.policy import device_runtime as runtime_module
from megatron_rlpt.policy.device_runtime import DeviceRuntime, _CpuTorch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what stands in for CUDA is not used where CUDA is")

FRESH_PROCESS = """
import sys
import torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    logits = model(torch.arange(40)[None]).logits
torch.save({"logits": logits, "inv_freq": model.model.rotary_emb.inv_freq}, sys.argv[2])
assert "megatron_rlpt" not in sys.modules
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "tied")


@pytest.fixture(scope="module")
def runtime(llama) -> DeviceRuntime:
    """The runtime of a process in which Megatron has built, trained and projected a policy."""
    make_policy(llama).update(make_examples())
    return DeviceRuntime()


@pytest.fixture(scope="module")
def megatron_caller() -> types.ModuleType:
    """A module that looks like one of Megatron's."""
    module = types.ModuleType("megatron.core.caller")
    exec("def cuda(tensor): return tensor.cuda()\ndef type_(tensor, *to): return tensor.type(*to)", vars(module))
    return module


def test_transformers_is_right_in_a_process_where_megatron_has_run(runtime, llama, tmp_path):
    """With a globally patched torch, transformers leaves rotary buffers uninitialized, and logits are NaN."""
    command = [sys.executable, "-c", FRESH_PROCESS, str(llama), str(tmp_path / "fresh.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    fresh = torch.load(tmp_path / "fresh.pt")
    for context in (runtime.megatron, lambda: torch.no_grad()):
        with context():
            model = load_llama(llama)
        assert torch.equal(model.model.rotary_emb.inv_freq, fresh["inv_freq"])
        with torch.no_grad():
            assert torch.allclose(model(torch.arange(40)[None]).logits, fresh["logits"], atol=1e-5)


def test_cuda_outside_megatron_is_still_refused(runtime):
    for make in (lambda: torch.zeros(2, device="cuda"), lambda: torch.zeros(2).cuda(), torch.cuda.current_device):
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
            make()
        with runtime.megatron(), pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
            make()


def test_tensor_methods_are_torchs_own_outside_the_context_and_after_an_error_in_it(runtime):
    own = torch.Tensor.cuda, torch.Tensor.type
    assert all(isinstance(method, types.MethodDescriptorType) for method in own)

    def fail() -> None:
        assert torch.Tensor.cuda is not own[0]
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), runtime.megatron(), runtime.megatron():
        fail()
    assert (torch.Tensor.cuda, torch.Tensor.type) == own


def test_inside_the_context_only_megatron_sees_cuda(runtime, megatron_caller):
    tensor = torch.zeros(2)
    for depth in (1, 2):
        with runtime.megatron(), runtime.megatron() if depth == 2 else torch.no_grad():
            assert tensor.type() == "torch.FloatTensor"
            assert tensor.type(torch.int64).dtype is torch.int64
            assert megatron_caller.cuda(tensor) is tensor
            assert megatron_caller.type_(tensor) == "torch.cuda.FloatTensor"
            assert megatron_caller.type_(tensor.bfloat16()) == "torch.cuda.BFloat16Tensor"
            assert megatron_caller.type_(tensor, torch.int64).dtype is torch.int64
    assert megatron_caller.type_(tensor) == "torch.FloatTensor"


def test_every_megatron_module_has_the_stand_in_and_no_other_module_has(runtime):
    holders = {name for name, module in list(sys.modules.items()) if isinstance(_torch_of(module), _CpuTorch)}
    others = {name for name, module in list(sys.modules.items()) if _torch_of(module) is torch}
    assert len(holders) > 50
    assert {name for name in holders if not name.startswith("megatron.core")} == set()
    assert {name for name in others if name.startswith("megatron.core")} == set()
    assert "transformers.modeling_utils" in others
    assert "megatron_rlpt.policy.policy" in others


def test_a_megatron_module_imported_later_has_the_stand_in_too(runtime):
    import megatron.core.models

    names = [found.name for found in pkgutil.walk_packages(megatron.core.models.__path__, "megatron.core.models.")]
    late = [name for name in names if name not in sys.modules and name.endswith(("t5_model", "bert_model"))]
    assert late
    for name in late:
        module = importlib.import_module(name)
        assert module.torch is not torch
        assert module.torch.zeros(2, device="cuda").device.type == "cpu"


def test_the_stand_in_makes_cpu_tensors_and_is_torch_in_all_else(runtime):
    stand_in = sys.modules["megatron.core.parallel_state"].torch
    for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
        assert stand_in.ones(2, device=device).device.type == "cpu"
    assert stand_in.cuda.current_device() == torch.device("cpu")
    assert torch.equal(stand_in.cuda.get_rng_state(), torch.get_rng_state())
    assert stand_in.Tensor is torch.Tensor
    assert stand_in.nn is torch.nn
    assert not stand_in.cuda.is_available()
    with pytest.raises(AttributeError):
        _ = stand_in.no_such_name


def test_the_runtime_says_which_device_is_in_force_and_why(runtime):
    assert (runtime.name, runtime.device.type, runtime.backend) == ("cpu", "cpu", "gloo")
    assert "finds no CUDA device" in runtime.describe()


@pytest.fixture
def gpus(monkeypatch):
    """Fake a machine with a number of GPUs; returns the calls to CUDA, in order."""

    def machine(count, **variables):
        events = []
        for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "CUDA_DEVICE_MAX_CONNECTIONS"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        queues = "CUDA_DEVICE_MAX_CONNECTIONS"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: events.append(os.environ.get(queues)) or True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", events.append)
        monkeypatch.setattr(runtime_module, "_install", lambda on_cuda: None)
        return events

    return machine


def test_the_gpu_of_a_rank_is_the_current_one_as_soon_as_there_is_a_runtime(gpus):
    """Queries of the current GPU before init_distributed must refer to this rank's GPU, not the first."""
    events = gpus(4, LOCAL_WORLD_SIZE="4")
    assert DeviceRuntime(LauncherEnvironment(rank=6, world=8, local_rank=2)).device == torch.device("cuda", 2)
    assert events == ["1", torch.device("cuda", 2)], "CUDA reads the number of its queues when it starts"


def test_a_rank_that_is_alone_leaves_the_queues_as_they_are(gpus):
    events = gpus(2)
    assert DeviceRuntime(LauncherEnvironment()).device == torch.device("cuda", 0)
    assert events == [None, torch.device("cuda", 0)]


def test_a_rank_that_sees_one_gpu_uses_it_whatever_its_number(gpus):
    gpus(1, LOCAL_WORLD_SIZE="4")
    assert DeviceRuntime(LauncherEnvironment(rank=3, world=4, local_rank=3)).device == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("variables", "local_rank", "ranks"),
    [({"LOCAL_WORLD_SIZE": "4"}, 0, 4), ({"SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, 1, 3), ({}, 2, 3)],
)
def test_more_ranks_than_gpus_are_refused_before_cuda_is_touched(gpus, variables, local_rank, ranks):
    events = gpus(2, **variables)
    with pytest.raises(ConfigError, match=f"^{ranks} ranks were started on .* has 2 GPUs.*; start 2 ") as raised:
        DeviceRuntime(LauncherEnvironment(rank=local_rank, world=8, local_rank=local_rank))
    assert "\n" not in str(raised.value)
    assert torch.device("cuda", local_rank) not in events


def test_ranks_that_each_see_one_gpu_must_not_see_the_same():
    one, two = ("node1", "GPU-a"), ("node2", "GPU-a")
    runtime_module._require_own_gpus([one, two, ("node1", "GPU-b")])
    with pytest.raises(ConfigError, match="ranks 0 and 2 have the same GPU of node1"):
        runtime_module._require_own_gpus([one, two, one])


def _torch_of(module: object) -> object:
    try:
        held = vars(module).get("torch")
    except TypeError:
        return None
    return held if isinstance(held, types.ModuleType) and held.__name__ == "torch" else None


def test_memory_that_is_free_between_used_pieces_is_returned_while_a_policy_trains(llama):
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    policy = make_policy(llama)
    pieces = [torch.ones(2**14) for _ in range(4096)]  # 256 MiB
    used = pieces[::8]
    held = resident()
    del pieces
    for _ in range(16):
        policy.update(make_examples())
    assert resident() < held - 128 * 2**20
    assert all(float(piece.sum()) == 2**14 for piece in used)


def test_a_deterministic_run_changes_nothing_on_a_cpu_and_everything_that_a_gpu_needs(monkeypatch):
    names = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO")
    for name in names:
        monkeypatch.setenv(name, "")  # remembers what to restore
        monkeypatch.delenv(name)
    monkeypatch.setattr(DeviceRuntime, "is_deterministic", False)
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    runtime = DeviceRuntime()
    runtime.make_deterministic()
    assert not asked
    assert not DeviceRuntime.is_deterministic
    assert not set(names) & set(os.environ)
    monkeypatch.setattr(runtime, "on_cuda", True)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    runtime.make_deterministic()
    assert asked == [True]
    assert DeviceRuntime.is_deterministic
    assert [os.environ[name] for name in names] == [":4096:8", "0", "Tree"]
