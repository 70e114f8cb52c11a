"""Rotary settings in every combination that a ``config.json`` can hold: the policy computes what transformers does.

Sequences are longer than what the scalings call the original length.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families_on_disk import save_family
from transformers import AutoModelForCausalLM

from megatron_rlpt.config import Dtype
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import CONVENTIONS, read_architecture
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.model import build_model
from megatron_rlpt.policy.weights import load_weights

LENGTH = 128
TOKENS = torch.randint(50, (1, LENGTH), generator=torch.Generator().manual_seed(1))
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def old(settings: dict[str, Any]) -> dict[str, Any]:
    """Use the type's name of releases before 4.45."""
    return {"type" if key == "rope_type" else key: value for key, value in settings.items()}


def without(settings: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != key}


SCALINGS = (LINEAR, YARN, LLAMA3)
PLACES: list[dict[str, Any]] = [
    # Each alone, both together, and with the base inside and outside.
    *({"rope_parameters": scaling | {"rope_theta": 500.0}} for scaling in (DEFAULT, *SCALINGS)),
    *({"rope_parameters": scaling, "rope_theta": 500.0} for scaling in SCALINGS),
    *({"rope_scaling": spelled(scaling), "rope_theta": 500.0} for scaling in SCALINGS for spelled in (dict, old)),
    *({"rope_parameters": DEFAULT, "rope_scaling": scaling} for scaling in SCALINGS),
    *({"rope_parameters": DEFAULT, "rope_scaling": old(scaling), "rope_theta": 300.0} for scaling in SCALINGS),
    *({"rope_parameters": one, "rope_scaling": other} for one, other in itertools.permutations(SCALINGS, 2)),
    {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": None},
    {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": {}},
    {"rope_parameters": None, "rope_scaling": YARN | {"rope_theta": 500.0}, "rope_theta": 300.0},
    {"rope_parameters": DEFAULT, "rope_scaling": YARN | {"rope_theta": 300.0}},
    {"rope_parameters": {}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_theta": 300.0}, "rope_theta": 500.0},
    {"rope_theta": 300},
    {},
    {"rope_scaling": YARN | {"type": "linear"}},
    {"rope_scaling": LINEAR | {"type": "yarn"}},
]
LENGTHS: list[dict[str, Any]] = [
    {"rope_scaling": without(YARN, "original_max_position_embeddings")},
    {"rope_scaling": without(YARN, "original_max_position_embeddings"), "original_max_position_embeddings": 16},
    {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")},
    {"rope_scaling": LINEAR, "original_max_position_embeddings": 16},
    {"rope_scaling": YARN | {"factor": None}},
    {"rope_scaling": YARN | {"factor": 3}},
]
OPTIONS: list[dict[str, Any]] = [
    {"rope_scaling": YARN | options}
    for options in (
        {"attention_factor": 0.5},
        {"attention_factor": None},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"mscale": 0.7},
        {"mscale": 0.7, "mscale_all_dim": 0},
        {"mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": 1.1},
        {"truncate": False},
        {"truncate": None},
        {"beta_fast": 8, "beta_slow": 2.0},
        {"beta_fast": None, "beta_slow": 0},
        {"partial_rotary_factor": 1.0},
        {"finetuned": True, "low_freq_factor": 3.0},
    )
] + [{"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0}}]
EITHER: list[dict[str, Any]] = [
    # transformers cannot compute these, or only for one length: refused, unless the result is the same.
    *({"rope_scaling": without(scaling, "factor")} for scaling in SCALINGS),
    *({"rope_scaling": without(LLAMA3, key)} for key in ("low_freq_factor", "high_freq_factor")),
    *({"rope_scaling": scaling | {"factor": None}} for scaling in (LINEAR, LLAMA3)),
    *({"rope_scaling": {"rope_type": kind, "factor": 2.0}} for kind in ("dynamic", "longrope", "su", "mrope", None)),
    {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
    {"rope_scaling": YARN, "partial_rotary_factor": 0.5},
    {"rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT}},
    {"rope_theta": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_scaling": YARN | {"original_max_position_embeddings": None}},
    {"rope_scaling": YARN, "original_max_position_embeddings": None},
    {"rope_theta": "500"},
    {"rope_scaling": "yarn"},
]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A folder of every family whose config.json the tests write, and the rest of it."""
    base, found = tmp_path_factory.mktemp("families"), {}
    for family in CONVENTIONS:
        folder = save_family(
            base / family, family, num_hidden_layers=1, max_position_embeddings=LENGTH, sliding_window=None, head_dim=8
        )
        raw = json.loads((folder / "config.json").read_text())
        found[family] = folder, {key: value for key, value in raw.items() if not key.startswith("rope_")}
    return found


@pytest.fixture(scope="module")
def runtime() -> DeviceRuntime:
    runtime = DeviceRuntime()
    runtime.init_distributed()
    return runtime


def ours(folder: Path, runtime: DeviceRuntime) -> torch.Tensor:
    arch = read_architecture(folder)
    (model,) = model_chunks = build_model(arch, Dtype.fp32, runtime)
    load_weights(model_chunks, arch, Layout(), folder)
    with torch.no_grad(), runtime.megatron():
        return model(TOKENS, torch.arange(LENGTH)[None], None) @ model.output_weight()[: arch.vocab].t()


def theirs(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS).logits


def differ(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("entries", [*PLACES, *LENGTHS, *OPTIONS], ids=json.dumps)
def test_the_policy_computes_what_transformers_does(families, runtime, entries):
    family = list(CONVENTIONS)[len(json.dumps(entries)) % len(CONVENTIONS)]  # each in its turn
    folder, raw = families[family]
    (folder / "config.json").write_text(json.dumps(raw | entries))
    assert differ(ours(folder, runtime), theirs(folder)) < 1e-4


@pytest.mark.parametrize("family", CONVENTIONS)
def test_a_scaling_beside_default_parameters_counts_in_every_family(families, runtime, family):
    """Guards the test above: without it the logits differ."""
    folder, raw = families[family]
    found = []
    for entries in (
        {"rope_parameters": DEFAULT},
        {"rope_parameters": DEFAULT, "rope_scaling": YARN, "rope_theta": 500.0},
    ):
        (folder / "config.json").write_text(json.dumps(raw | entries))
        found.append(ours(folder, runtime))
        assert differ(found[-1], theirs(folder)) < 1e-4
    assert differ(*found) > 1e-2


@pytest.mark.parametrize("entries", EITHER, ids=json.dumps)
def test_what_is_not_computed_alike_is_refused_in_one_line(families, entries):
    folder, raw = families["llama"]
    (folder / "config.json").write_text(json.dumps(raw | entries))
    with pytest.raises(ModelError) as caught:
        read_architecture(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_base_of_mixtral_is_another_where_none_is_given(families, runtime):
    folder, raw = families["mixtral"]
    (folder / "config.json").write_text(json.dumps(raw | {"rope_scaling": YARN}))
    assert read_architecture(folder).rope.theta == 1e6
    assert differ(ours(folder, runtime), theirs(folder)) < 1e-4
