from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.config import Dtype, Fp8
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import parse_architecture
from megatron_rlpt.policy import precision
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.precision import TransformerEngine, check_sizes, length_multiple, require, supported_recipes

ON = [fp8 for fp8 in Fp8 if fp8 is not Fp8.off]


def engine(version: str, name: str, major: int, minor: int, cuda: float) -> TransformerEngine:
    """The results of Transformer Engine's check functions on such a GPU (transformer_engine/pytorch/fp8.py)."""

    def check(function: str) -> tuple[bool, str]:
        if function == "check_fp8_support":
            return (major, minor) >= (8, 9), "Device compute capability 8.9 or higher required for FP8 execution."
        if function == "check_mxfp8_support":
            return major >= 10, "Device compute capability 10.0 or higher required for MXFP8 execution."
        assert function == "check_fp8_block_scaling_support"
        reason = "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9."
        return major >= 9 and cuda >= 12.9, reason

    return TransformerEngine(version, f"{name} (compute capability {major}.{minor})", check)


MACHINES: list[tuple[TransformerEngine | str, set[str]]] = [
    ("torch finds no CUDA device", set()),
    (engine("2.8.0", "A100", 8, 0, 12.9), set()),
    (engine("2.8.0", "L40S", 8, 9, 12.9), {"delayed", "current"}),
    (engine("2.8.0", "H100", 9, 0, 12.8), {"delayed", "current"}),
    (engine("2.8.0", "H100", 9, 0, 12.9), {"delayed", "current", "blockwise"}),
    (engine("2.10.0+abc", "B200", 10, 0, 13.0), {"delayed", "current", "blockwise", "mxfp8"}),
    (engine("2.2.0", "B200", 10, 0, 13.0), {"delayed", "current", "mxfp8"}),
    (engine("2.1.0", "B200", 10, 0, 13.0), {"delayed", "mxfp8"}),
    (engine("1.13.0", "B200", 10, 0, 13.0), {"delayed"}),
]


@pytest.mark.parametrize(("machine", "supported"), MACHINES)
def test_each_recipe_is_taken_or_refused_with_the_reason_and_what_would_work(monkeypatch, machine, supported):
    monkeypatch.setattr(precision, "find_engine", lambda: machine)
    assert {fp8.value for fp8 in supported_recipes()} == supported
    for fp8 in ON:
        if fp8.value in supported:
            require(fp8, Dtype.bf16)
            continue
        with pytest.raises(ConfigError) as caught:
            require(fp8, Dtype.bf16)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"model.fp8 is {fp8.value}: ")
        listed = message.split("; supported here: ")[1].split(", ")
        assert set(listed) == supported | {"off"}


def test_the_reason_names_the_version_or_the_gpu(monkeypatch):
    monkeypatch.setattr(precision, "find_engine", lambda: engine("2.1.0", "H100", 9, 0, 12.9))
    with pytest.raises(ConfigError, match=r"needs Transformer Engine 2\.2 or newer, and 2\.1\.0 is installed"):
        require(Fp8.current, Dtype.bf16)
    with pytest.raises(ConfigError, match=r"capability 10\.0 .* this is H100 \(compute capability 9\.0\)"):
        require(Fp8.mxfp8, Dtype.bf16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_here_there_is_no_fp8_and_off_needs_nothing():
    assert supported_recipes() == ()
    require(Fp8.off, Dtype.fp32)
    with pytest.raises(ConfigError, match="torch finds no CUDA device; supported here: off"):
        require(Fp8.delayed, Dtype.bf16)


def test_fp8_on_top_of_fp32_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "find_engine", lambda: engine("2.8.0", "H100", 9, 0, 12.9))
    with pytest.raises(ConfigError, match=r"model\.dtype fp32; FP8 needs model\.dtype=bf16"):
        require(Fp8.current, Dtype.fp32)


@pytest.mark.parametrize("fp8", ON)
def test_megatron_takes_the_arguments_and_names_the_recipe_alike(fp8):
    arguments = precision.transformer_arguments(fp8)
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, bf16=True, **arguments)
    assert config.fp8 in ("hybrid", "e4m3")
    assert Fp8Recipe(config.fp8_recipe)
    assert get_fp8_align_size(Fp8Recipe(config.fp8_recipe)) == precision.RECIPES[fp8].multiple


def test_every_recipe_of_the_schema_is_known_and_off_adds_no_argument():
    assert set(precision.RECIPES) == set(ON)
    assert precision.transformer_arguments(Fp8.off) == {}


@pytest.mark.parametrize(
    ("layout", "fp8", "expected"),
    [
        (Layout(), Fp8.off, 1),
        (Layout(tensor=4), Fp8.off, 1),
        (Layout(tensor=4, sequence=True), Fp8.off, 4),
        (Layout(context=2), Fp8.off, 4),
        (Layout(tensor=2, sequence=True, context=2), Fp8.off, 8),
        (Layout(), Fp8.current, 16),
        (Layout(), Fp8.mxfp8, 32),
        (Layout(tensor=4, sequence=True), Fp8.delayed, 64),
        (Layout(context=2), Fp8.mxfp8, 64),
        (Layout(tensor=3, sequence=True, context=2), Fp8.blockwise, 96),
    ],
)
def test_rows_are_padded_so_that_every_rank_has_a_size_that_its_products_take(layout, fp8, expected):
    multiple = length_multiple(layout, fp8)
    assert multiple == expected
    share = multiple // layout.context // (layout.tensor if layout.sequence else 1)
    assert multiple % (2 * layout.context if layout.context > 1 else 1) == 0
    if fp8 is not Fp8.off:
        assert share % precision.RECIPES[fp8].multiple == 0


def test_a_model_whose_matrices_fp8_cannot_take_is_refused(tmp_path):
    raw = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 64, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    arch = parse_architecture(raw, tmp_path)
    for fp8 in ON:
        check_sizes(fp8, arch, Layout())
    check_sizes(Fp8.off, dataclasses.replace(arch, hidden=577), Layout())
    with pytest.raises(ConfigError, match=r"model\.fp8 is mxfp8: the hidden size is 560, not a multiple of 32"):
        check_sizes(Fp8.mxfp8, dataclasses.replace(arch, hidden=560), Layout())
    with pytest.raises(ConfigError, match=r"feed-forward size per tensor-parallel rank is 24, not a multiple of 16"):
        check_sizes(Fp8.current, dataclasses.replace(arch, ffn_hidden=72), Layout(tensor=3))
