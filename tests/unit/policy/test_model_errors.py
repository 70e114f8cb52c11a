"""Unusable model folders: each is refused before training with one line that names the fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llamas import make_policy, save_llama
from safetensors.torch import load_file, save_file

from megatron_rlpt.errors import ModelError

Q, K = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
GATE, UP = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "good")


def config(**entries: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def tensors(**changed: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        for alias, tensor in changed.items():
            name = {"q": Q, "k": K, "gate": GATE, "up": UP, "embedding": EMBEDDING}[alias]
            held.pop(name) if tensor is None else held.update({name: tensor})
        save_file(held, folder / "model.safetensors")

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def not_finite(value: float) -> torch.Tensor:
    tensor = torch.zeros(48, 32)
    tensor[3, 4] = value
    return tensor


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist; give a Hugging Face folder in model.path"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read as JSON"),
    "config is not JSON": (text("config.json", "{"), "config.json cannot be read as JSON"),
    "config is a list": (text("config.json", "[]"), "config.json holds a list, not an object"),
    "family": (config(model_type="gpt2"), "model_type 'gpt2' is not supported; supported: llama"),
    "no family": (text("config.json", "{}"), "model_type None is not supported; supported: llama"),
    "attention bias": (config(attention_bias=True), "attention_bias is true; llama models with biases"),
    "mlp bias": (config(mlp_bias=True), "mlp_bias is true; llama models with biases"),
    "activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'; supported: 'silu'"),
    "missing entry": (
        text("config.json", '{"model_type": "llama"}'),
        "is missing or not a number: 'num_attention_heads'",
    ),
    "not a number": (config(vocab_size="many"), "is missing or not a number: invalid literal"),
    "heads": (config(num_key_value_heads=3), "num_key_value_heads is 3; it must divide 4 attention heads"),
    "rope type": (config(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope' is not supported"),
    "llama3 constants": (
        config(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "rope type 'llama3' lacks low_freq_factor, high_freq_factor",
    ),
    "old rope key hides the new": (
        config(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' is not supported",
    ),
    "context": (config(max_position_embeddings=47), "data.max_prefix + data.suffix_length is 48 tokens"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors file"),
    "truncated weights": (truncate, "model.safetensors is not a readable safetensors file"),
    "weights are text": (text("model.safetensors", "<html>"), "model.safetensors is not a readable safetensors file"),
    "index names a missing file": (
        text(INDEX, json.dumps({"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}})),
        f"lacks model-00001-of-00002.safetensors, which {INDEX} names",
    ),
    "index is not JSON": (text(INDEX, "{"), f"{INDEX} is not a readable index"),
    "index without a map": (text(INDEX, "{}"), f"{INDEX} is not a readable index"),
    "index is a list": (text(INDEX, "[]"), f"{INDEX} is not a readable index"),
    "missing tensor": (tensors(up=None), f"has no tensor '{UP}', which its config.json asks for"),
    "missing output layer": (config(tie_word_embeddings=False), "has no tensor 'lm_head.weight'"),
    "other vocabulary": (
        tensors(embedding=torch.zeros(51, 32)),
        f"{EMBEDDING} is (51, 32) where config.json asks for (50, 32)",
    ),
    "key heads do not divide": (tensors(k=torch.zeros(7, 32)), f"{K} is (7, 32) where config.json asks for (16, 32)"),
    "query and key exchanged": (
        tensors(q=torch.zeros(16, 32), k=torch.zeros(32, 32)),
        f"{Q} is (16, 32) where config.json asks for (32, 32)",
    ),
    "gate and up of other sizes, right sum": (
        tensors(gate=torch.zeros(40, 32), up=torch.zeros(56, 32)),
        f"{GATE} is (40, 32) where config.json asks for (48, 32)",
    ),
    "other hidden size": (tensors(gate=torch.zeros(48, 30)), f"{GATE} is (48, 30) where config.json asks for (48, 32)"),
    "not a number in weights": (tensors(up=not_finite(float("nan"))), f"{UP} holds values that are not finite"),
    "infinity in weights": (tensors(gate=not_finite(float("-inf"))), f"{GATE} holds values that are not finite"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(good, tmp_path, fault):
    damage, message = BROKEN[fault]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        make_policy(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_the_undamaged_folder_is_accepted(good):
    assert make_policy(good).version == 0
