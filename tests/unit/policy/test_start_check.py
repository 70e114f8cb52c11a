"""The start check against transformers: every family passes, and no misread configuration does."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_on_disk import OWN, save_family
from llamas import settings

from megatron_rlpt.config import Config, Dtype, ModelConfig
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.rope import Rope
from megatron_rlpt.objectives import build_objective
from megatron_rlpt.policy import policy as policies
from megatron_rlpt.policy import transformers_layers
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.start_check import spread

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    own = {"qwen3": {"rope_scaling": YARN}, "qwen3_moe": {"norm_topk_prob": False}}
    return {family: save_family(base / family, family, **own.get(family, {})) for family in OWN}


def load(folder: Path, dtype: Dtype = Dtype.fp32) -> tuple[Policy, Config]:
    config = dataclasses.replace(settings(folder), model=ModelConfig(path=str(folder), dtype=dtype))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_prefix=20))
    return Policy(config, build_objective(config.objective), DeviceRuntime()), config


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
@pytest.mark.parametrize("family", OWN)
def test_every_family_computes_what_transformers_does(folders, monkeypatch, caplog, family, dtype, whole):
    if not whole:
        monkeypatch.setattr(transformers_layers, "WHOLE", 0)
    policy, config = load(folders[family], dtype)
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    with caplog.at_level(logging.INFO):
        policy.check_start(config)
    said = [
        record.getMessage() for record in caplog.records if "the policy agrees with transformers" in record.getMessage()
    ]
    assert len(said) == 1
    assert f"{4 if whole else 3} layers" in said[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.weights()), "it leaves no trace"


def misread(**entries: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Misread ``config.json``: replace fields of the architecture."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        read = policies.read_architecture
        monkeypatch.setattr(policies, "read_architecture", lambda folder: dataclasses.replace(read(folder), **entries))

    return change


def other_router(monkeypatch: pytest.MonkeyPatch) -> None:
    read = policies.read_architecture

    def changed(folder: Path) -> Any:
        arch = read(folder)
        return dataclasses.replace(arch, experts=dataclasses.replace(arch.experts, normalized=True))

    monkeypatch.setattr(policies, "read_architecture", changed)


def other_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rlpt.policy import model

    build = model.transformer_config

    def changed(*arguments: Any, **named: Any) -> Any:
        config = build(*arguments, **named)
        config.activation_func = torch.nn.functional.gelu
        return config

    monkeypatch.setattr(model, "transformer_config", changed)


def in_place(pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change loaded tensors whose names end with ``pattern``."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron_rlpt.policy.weights import load_weights

        def changed(model_chunks: Any, *arguments: Any) -> None:
            load_weights(model_chunks, *arguments)
            named = [
                entry
                for model_chunk in model_chunks
                for entry in model_chunk.named_parameters()
                if entry[0].endswith(pattern)
            ]
            assert named
            with torch.no_grad():
                for _, parameter in named:
                    parameter.copy_(change(parameter.clone()))

        monkeypatch.setattr(policies, "load_weights", changed)

    return patch


WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], str]] = {
    "YaRN as plain": ("qwen3", misread(rope=Rope(10000.0)), "rotary frequencies are off by up to 3"),
    "plain as YaRN": ("llama", misread(rope=Rope(10000.0, "yarn", tuple(YARN.items())[1:])), "rotary frequencies"),
    "scale of attention": (
        "qwen3",
        misread(rope=Rope(10000.0, "yarn", (*tuple(YARN.items())[1:], ("attention_factor", 1.5)))),
        "attention is scaled by",
    ),
    "base": ("llama", misread(rope=Rope(10001.0)), "rotary frequencies are off by up to 0.0"),
    "epsilon": ("llama", misread(norm_eps=1e-5), "rms_norm_eps is 1e-05, not 1e-06"),
    "window": ("mistral", lambda _: None, "layer 0 sees 16 tokens back, and sequences of the run have up to 28"),
    "activation": ("llama", other_activation, "the output of layer 0 is off by"),
    "router": ("qwen3_moe", other_router, "the output of layer 0 is off by"),
    "norm of heads": ("qwen3", in_place("q_layernorm.weight", torch.ones_like), "the output of layer 0 is off by"),
    "biases": ("qwen2", in_place("linear_qkv.bias", torch.zeros_like), "the output of layer 0 is off by"),
    "order of heads": ("qwen2", in_place("linear_qkv.weight", lambda t: t.roll(8, 0)), "the output of layer 0"),
    "gate and up": ("llama", in_place("3.mlp.linear_fc1.weight", lambda t: t.roll(48, 0)), "output of layer 3 is off"),
    "embedding": ("mistral", in_place("word_embeddings.weight", lambda t: 2 * t), "the token embedding differs"),
    "head": ("mistral", in_place("output_layer.weight", lambda t: t.roll(1, 0)), "the last norm or the output layer"),
    "last norm": ("qwen2", in_place("final_layernorm.weight", torch.ones_like), "the last norm or the output layer"),
}


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
@pytest.mark.parametrize("fault", WRONG)
def test_a_misreading_is_refused_and_named(folders, monkeypatch, tmp_path, fault, dtype):
    family, misreading, message = WRONG[fault]
    folder = folders[family]
    if fault == "window":
        misread(max_positions=64)(monkeypatch)
        folder = save_family(tmp_path / "narrow", family, sliding_window=16)
    misreading(monkeypatch)
    policy, config = load(folder, dtype)
    with pytest.raises(ModelError) as caught:
        policy.check_start(config)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_transformers_cannot_load_is_refused_in_one_line(tmp_path):
    folder = save_family(tmp_path / "mixtral", "mixtral")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"rope_parameters": None, "rope_scaling": YARN}  # which its YaRN does not take without head_dim
    (folder / "config.json").write_text(json.dumps(raw | {"head_dim": None}))
    policy, config = load(folder)
    with pytest.raises(ModelError, match="transformers cannot load") as caught:
        policy.check_start(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "expected"), [(range(3), [0, 1, 2]), (range(10, 20), [10, 14, 19]), ([5], [5]), (range(4), [0, 2, 3])]
)
def test_layers_of_a_large_model_are_taken_from_both_ends_and_the_middle(numbers, expected):
    assert spread(numbers, 3) == expected
