"""vLLM with mixtures of experts: weight updates, which the CPU's kernel needs packed, and the experts it reports."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from mixtures_on_disk import LAYERS, PER_TOKEN, experts_by_transformers, save_mixture
from prefork import VLLM, forked
from tiny_runs import finish

from megatron_rlpt.rollout.vllm.routing import routing_arguments

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model")


def run(script: str, *arguments: str) -> str:
    """Return what a script prints. In a separate process: the groups of vLLM in this one belong to another model."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code, out, err = finish(forked(VLLM, [sys.executable, str(HERE / script), *arguments], env=env))
    assert code == 0, err
    return out


def test_experts_arrive_as_the_kernel_reads_them(mixture):
    assert run("experts_alone.py", str(mixture)).split()[-1] == "0"


def test_rollouts_say_which_experts_computed_every_token_but_the_last(mixture):
    """As transformers chooses them; also for prefixes from the cache, after an update and from another process."""
    found = json.loads(run("routing_alone.py", str(mixture)).splitlines()[-1])
    assert found["first"] == found["second"] == found["apart"]
    assert len({tuple(prefix) for prefix, *_ in found["first"]}) == 8
    assert sum(len(prefix) > 32 for prefix, *_ in found["first"]) > 3, "some prefixes fill a block of the cache"
    for prefix, tokens, of_prefix, of_completion in found["first"]:
        recorded = torch.tensor(of_prefix + of_completion).view(-1, LAYERS, PER_TOKEN).sort(-1).values
        assert len(of_prefix) == len(prefix) * LAYERS * PER_TOKEN
        assert torch.equal(recorded, experts_by_transformers(mixture, [*prefix, *tokens])[:-1])


def test_the_installed_vllm_has_the_names_under_which_gpus_return_experts():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.outputs import CompletionOutput

    assert routing_arguments(on_cuda=True).keys() <= EngineArgs.__dataclass_fields__.keys()
    assert "routed_experts" in CompletionOutput.__dataclass_fields__
