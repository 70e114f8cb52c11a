"""The experts of rollouts, as vLLM on GPUs returns them and as our recorder in its worker keeps them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import Experts, parse_architecture
from megatron_rlpt.rollout.engine import Continuation, sample_rollouts
from megatron_rlpt.rollout.vllm.routing import RequestRows, recorded_routing, routing_arguments
from megatron_rlpt.types import Episode, Routing

LAYERS, PER_TOKEN, BLOCK = 3, 2, 4
ARCH = replace(
    parse_architecture(
        {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96, "head_dim": 8,
         "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64,
         "rms_norm_eps": 1e-5},
        Path("model"),
    ),
    experts=Experts(count=8, per_token=PER_TOKEN, ffn_hidden=16, normalized=True),
)  # fmt: skip
MANY = replace(ARCH, experts=Experts(count=500, per_token=PER_TOKEN, ffn_hidden=16, normalized=True))


def experts_of(tokens: list[int], count: int = 8) -> np.ndarray:
    """[tokens, layers, per token], the same for the same tokens so far."""
    rows = []
    for end in range(1, len(tokens) + 1):
        draw = random.Random(repr(tokens[:end]))
        rows.append([draw.sample(range(count), PER_TOKEN) for _ in range(LAYERS)])
    return np.array(rows, dtype=np.int64).reshape(-1, LAYERS, PER_TOKEN)


@dataclass
class Output:
    """An output of vLLM."""

    request_id: str
    prompt_token_ids: list[int]
    completion: list[int]
    routed: np.ndarray | None = None
    outputs: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = [SimpleNamespace(token_ids=self.completion, routed_experts=self.routed)]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt_token_ids, *self.completion]


def expected(output: Output, width: int = 1, count: int = 8) -> Routing:
    data = experts_of(output.tokens, count)[:-1].astype(f"<u{width}")
    prefix = len(output.prompt_token_ids)
    return Routing(data[:prefix].tobytes(), data[prefix:].tobytes(), LAYERS, PER_TOKEN, width)


def test_on_gpus_vllm_is_asked_for_experts_and_returns_them():
    assert routing_arguments(on_cuda=True) == {"enable_return_routed_experts": True}
    outputs = [Output("0", [1, 2, 3], [4, 5]), Output("1", [6], [7])]
    outputs = [replace_routed(one, experts_of(one.tokens)[:-1].astype(np.uint8)) for one in outputs]
    assert recorded_routing(None, outputs, ARCH, on_cuda=True, block=BLOCK) == [expected(one) for one in outputs]


def replace_routed(output: Output, routed: np.ndarray | None) -> Output:
    return Output(output.request_id, output.prompt_token_ids, output.completion, routed)


def test_more_than_256_experts_take_two_bytes():
    output = Output("0", [1, 2, 3], [4, 5])
    output = replace_routed(output, experts_of(output.tokens, 500)[:-1].astype(np.uint16))
    (found,) = recorded_routing(None, [output], MANY, on_cuda=True, block=BLOCK)
    assert found == expected(output, width=2, count=500)


@pytest.mark.parametrize(
    "spoil",
    [lambda rows: None, lambda rows: rows[1:], lambda rows: rows[:, :2], lambda rows: rows + 7],
    ids=["none", "too few", "another model", "no such expert"],
)
def test_missing_or_impossible_experts_end_the_run_with_one_line(spoil):
    output = Output("0", [1, 2, 3], [4, 5])
    output = replace_routed(output, spoil(experts_of(output.tokens)[:-1].astype(np.uint8)))
    with pytest.raises(EngineError, match=r"^vLLM recorded .* set rollout.router_replay=false$"):
        recorded_routing(None, [output], ARCH, on_cuda=True, block=BLOCK)


class FakeWorker:
    """Computes requests in steps as vLLM's scheduler might, with a prefix cache; knows them by longer names."""

    def __init__(self) -> None:
        self.rows: dict[str, list[RequestRows]] = {"9-probe": [RequestRows(start=0, experts=b"")]}

    def compute(self, output: Output, *bounds: int) -> None:
        """Compute the tokens between the bounds, each in a step."""
        experts = experts_of(output.tokens).astype(np.int16)
        self.rows[f"{output.request_id}-a1b2"] = [
            RequestRows(start=start, experts=experts[start:end].tobytes()) for start, end in pairwise(bounds)
        ]

    def collective_rpc(self, name: str) -> list[dict[str, list[RequestRows]]]:
        assert name == "rlpt_take_routing"
        return [self.rows]


def test_on_a_cpu_what_came_from_the_prefix_cache_is_what_another_request_computed():
    worker, prefix = FakeWorker(), list(range(10, 20))
    first, second = Output("1", prefix, [1, 2, 3]), Output("11", prefix, [4, 5, 6])
    longer = Output("2", [*prefix[:8], 30, 31, 32], [7, 8])
    worker.compute(second, 8, 10, 11, 12, 13)  # also the step of the last token, scheduled ahead
    worker.compute(longer, 8, 11, 12)
    worker.compute(first, 0, 10, 11, 12)
    outputs = [second, longer, first]
    found = recorded_routing(worker, outputs, ARCH, on_cuda=False, block=BLOCK)
    assert found == [expected(one) for one in outputs]
    assert found[0].prefix is found[2].prefix, "sent to other ranks once"


def test_tokens_that_nobody_computed_are_not_made_up():
    worker, output = FakeWorker(), Output("1", list(range(10, 20)), [1, 2, 3])
    worker.compute(output, 8, 10, 11, 12)
    other = Output("2", [9, *range(11, 20)], [1])
    worker.compute(other, 0, 10)
    with pytest.raises(EngineError, match=r"rollout\.router_replay=false"):
        recorded_routing(worker, [output, other], ARCH, on_cuda=False, block=BLOCK)


def test_rollouts_of_an_episode_share_the_record_of_its_prefix():
    """An update computes the prefix once; a rollout that loses its last tokens loses their experts."""

    class Engine:
        version = 0

        def generate(self, prompts, max_tokens, version):
            return [
                Continuation((1, 2, 3), (0.0,) * 3, "length", Routing(bytes([number] * 6), bytes(range(12)), 3, 2, 1))
                for number, _ in enumerate(prompts)
            ]

        def update_weights(self, weights, version):
            raise NotImplementedError

    episodes = [Episode(name, (5,), (6,), "c", "d", 0) for name in "ab"]
    groups = sample_rollouts(Engine(), episodes, [3, 2], 3, 0, 0)
    for rollouts, first in zip(groups, (0, 3), strict=True):
        records = [one.routing for one in rollouts]
        assert {id(record.prefix) for record in records} == {id(records[0].prefix)}
        assert records[0].prefix == bytes([first] * 6)
        assert records[0].cut(1).completion == bytes(range(6))
