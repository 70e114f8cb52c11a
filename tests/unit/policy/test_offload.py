"""Optimizer state in host memory; on a CPU both places are host memory, but the tensors are moved all the same."""

from __future__ import annotations

import pytest
import torch
from llamas import make_examples, make_policy, save_llama

from megatron_rlpt.config import Dtype
from megatron_rlpt.policy.offload import OptimizerOffload
from megatron_rlpt.policy.optimizer import parts_with_parameters


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_updates_around_an_offload_are_those_without(tmp_path, dtype):
    """With fp32 parameters, main weights are views of the parameters: moving them would end the training silently."""
    llama = save_llama(tmp_path / "llama")
    moved, still = (make_policy(llama, model={"dtype": Dtype(dtype)}) for _ in range(2))
    offload = OptimizerOffload(parts_with_parameters(moved._optimizer), torch.device("cpu"))
    for _ in range(3):
        offload.offload()
        offload.offload()
        offload.restore()
        offload.restore()
        assert moved.update(make_examples()) == still.update(make_examples())
    for (name, tensor), (_, expected) in zip(moved.weights(), still.weights(), strict=True):
        assert torch.equal(tensor, expected), name


def test_everything_moves_to_buffers_that_are_kept(tmp_path):
    policy = make_policy(save_llama(tmp_path / "llama"), model={"dtype": Dtype.bf16})
    policy.update(make_examples())
    parts = parts_with_parameters(policy._optimizer)
    offload = OptimizerOffload(parts, torch.device("cpu"))

    def addresses():
        return {
            tensor.data_ptr()
            for part in parts
            for tensor in (
                *(weight for group in part.optimizer.param_groups for weight in group["params"]),
                *(value for state in part.optimizer.state.values() for value in state.values() if value.dim()),
            )
        }

    before = addresses()
    offload.offload()
    hosted = addresses()
    assert len(hosted) == len(before)
    assert not hosted & before
    for part in parts:
        for state in part.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].clone()  # as after a load
    offload.restore()
    offload.offload()
    assert addresses() == hosted
