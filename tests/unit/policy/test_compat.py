from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys

import pytest
import torch
from llamas import make_policy, save_llama

from megatron_rlpt.errors import RlptError
from megatron_rlpt.policy import megatron_compat as compat
from megatron_rlpt.policy.device_runtime import DeviceRuntime


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> DeviceRuntime:
    """The runtime of a process in which Megatron has built a policy."""
    make_policy(save_llama(tmp_path_factory.mktemp("llama") / "tied"))
    return DeviceRuntime()


@pytest.mark.parametrize("version", ["0.16.0", "0.16.1", "0.17.1", "0.18.0rc1", "0.19.2", "0.19.2+abc"])
def test_releases_in_the_range_are_supported(version):
    assert compat.version_problem(version) is None


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "1.0.0", "0.2.0", "unknown"])
def test_other_releases_are_named_with_the_range(version):
    problem = compat.version_problem(version)
    assert problem.startswith(f"megatron-core {version} is not supported, only 0.16 to 0.19")
    assert "\n" not in problem


def test_the_runtime_refuses_an_unsupported_release_in_one_line(monkeypatch):
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "__version__", "0.20.0")
    with pytest.raises(RlptError, match=r"megatron-core 0\.20\.0 .*pip install 'megatron-core>=0\.16,<0\.20'$"):
        DeviceRuntime()


def test_the_runtime_refuses_a_megatron_that_could_never_finish_a_checkpoint(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "psutil" else find(name, *a))
    with pytest.raises(RlptError, match=r"psutil is not installed.*pip install psutil"):
        DeviceRuntime()


def test_the_installed_release_is_one_of_the_supported():
    assert compat.version_problem(importlib.metadata.version("megatron-core")) is None


def test_the_range_can_be_asked_for_without_torch_and_megatron():
    code = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'megatron.core'): sys.modules[name] = None\n"
        "from megatron_rlpt.policy.megatron_compat import version_problem\n"
        "assert version_problem('0.16.1') is None and version_problem('0.20.0')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_router_of_experts_has_the_name_it_asks_for(runtime):
    from megatron.core.transformer.moe import moe_utils

    assert moe_utils.te_general_gemm is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="what stands in for CUDA is not used where CUDA is")
def test_megatrons_generator_state_is_that_of_the_cpu(runtime):
    from megatron.core.tensor_parallel import random

    before = random._get_cuda_rng_state()
    drawn = torch.rand(3)
    random._set_cuda_rng_state(before)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what stands in for CUDA is not used where CUDA is")
def test_megatron_can_ask_for_a_stream_where_there_is_none(runtime):
    stream = sys.modules["megatron.core.parallel_state"].torch.cuda.current_stream()
    stream.wait_event(None)
    stream.wait_stream(stream)
    stream.synchronize()


def test_warnings_that_no_user_can_act_on_are_left_out_and_others_are_not(runtime, caplog):
    log = logging.getLogger("megatron.core.models.gpt.gpt_model")
    with caplog.at_level(logging.WARNING):
        log.warning("GPTModel IS DEPRECATED. Use another.")
        log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_planning_asks_for_the_writer_that_is_installed():
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    arguments = compat.own_writer_arguments(strategy.async_save)
    new = "async_strategy" in strategy.async_save.__code__.co_varnames
    assert arguments == ({"async_strategy": "mcore"} if new else {})


def test_a_cpu_build_of_torch_compiles_no_fusion(runtime):
    """Decorating one imports the compiler: a third of the time until a trainer on a laptop starts."""
    jit = sys.modules["megatron.core.jit"]
    assert (jit.jit_fuser is jit.noop_decorator) == (torch.version.cuda is None and torch.version.hip is None)
