"""GGUF files of every supported architecture: they yield the weights, configuration and tokenizer that they were made
from."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families_on_disk import same, save_family, tensors_in
from gguf_files import NAMES, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format
from megatron_rlpt.errors import CheckpointError, ModelError
from megatron_rlpt.models.architecture import read_architecture

pytestmark = pytest.mark.slow

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def file_of(folder: Path, model_type: str, **options) -> tuple[Path, Path]:
    # Blocks of 32 numbers are quantized together.
    model = save_family(folder / "model", model_type, intermediate_size=64)
    return model, write_gguf(model, folder / "model.gguf", **options)


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


@pytest.mark.parametrize("model_type", NAMES)
def test_an_unquantized_file_holds_the_model_it_was_made_of(tmp_path, model_type):
    model, file = file_of(tmp_path, model_type)
    convert(file, tmp_path / "out", Format.HF, dtype=torch.float32)
    assert same(tensors_in(tmp_path / "out"), tensors_in(model))
    tokens = torch.arange(2, 26)[None]
    assert torch.allclose(logits(tmp_path / "out", tokens), logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize("model_type", NAMES)
def test_the_configuration_is_that_of_the_model(tmp_path, model_type):
    model, file = file_of(tmp_path, model_type)
    convert(file, tmp_path / "out", Format.HF)
    ours, theirs = read_architecture(tmp_path / "out"), read_architecture(model)
    # Not stored in GGUF: mistral's window, which llama.cpp ignores, and init_std.
    changed = {"model_type", "max_positions"} if model_type == "mistral" else set()
    different = {key for key in vars(ours) if vars(ours)[key] != vars(theirs)[key]}
    assert different == changed | {"init_std"}


def test_weights_are_written_as_bf16_unless_asked_otherwise(tmp_path):
    model, file = file_of(tmp_path, "qwen2")
    convert(file, tmp_path / "out", Format.HF)
    expected = {name: tensor.bfloat16() for name, tensor in tensors_in(model).items()}
    assert same(tensors_in(tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16])
def test_quantized_files_give_what_transformers_gives_and_go_on_to_megatron(tmp_path, kind):
    _, file = file_of(tmp_path, "llama", kind=kind)
    said: list[str] = []
    convert(file, tmp_path / "out", Format.MEGATRON, dtype=torch.float32, verify=True, say=said.append)
    assert "bit for bit" in "\n".join(said)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    convert(tmp_path / "out", tmp_path / "back", Format.HF)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors_in(tmp_path / "back").items())


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path):
    model = save_family(tmp_path / "model", "llama", rope_parameters=LLAMA3, head_dim=64)
    config = AutoModelForCausalLM.from_pretrained(model).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    divisors = (plain / scaled).numpy()
    assert divisors.max() == pytest.approx(32)
    file = write_gguf(model, tmp_path / "model.gguf", rope_divisors=divisors)
    convert(file, tmp_path / "out", Format.HF, dtype=torch.float32)
    read = read_architecture(tmp_path / "out").rope.parameters
    assert read == {key: pytest.approx(value) if key == "factor" else value for key, value in LLAMA3.items()}
    tokens = torch.arange(2, 26)[None]
    assert torch.allclose(logits(tmp_path / "out", tokens), logits(model, tokens), atol=1e-5)


def test_other_rotary_scalings_are_refused(tmp_path):
    model = save_family(tmp_path / "model", "llama")
    file = write_gguf(model, tmp_path / "a.gguf", rope_divisors=np.array([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not Llama 3's"):
        convert(file, tmp_path / "out", Format.HF)
    file = write_gguf(model, tmp_path / "b.gguf", **{"rope.scaling.type": "yarn"})
    with pytest.raises(ModelError, match="rope scaling 'yarn' is not supported"):
        convert(file, tmp_path / "out", Format.HF)


def test_the_tokenizer_comes_along(tmp_path):
    _, file = file_of(tmp_path, "qwen3")
    convert(file, tmp_path / "out", Format.HF)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("toato", add_special_tokens=False)) == ["toa", "to"]
    assert tokenizer.eos_token == "</s>"
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_unusable_files(tmp_path):
    model, file = file_of(tmp_path, "llama")
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="GGUF architecture 'gemma2' is not supported; supported: llama, qwen2"):
        convert(other, tmp_path / "out", Format.HF)
    with pytest.raises(ModelError, match="architecture 'llama' with experts"):
        convert(write_gguf(model, tmp_path / "mixtral.gguf", expert_count=8), tmp_path / "out", Format.HF)
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ModelError, match=r"short\.gguf is not a readable GGUF file"):
        convert(tmp_path / "short.gguf", tmp_path / "out", Format.HF)
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_a_file_is_not_read(tmp_path):
    _, file = file_of(tmp_path, "llama")
    convert(file, tmp_path / "alone", Format.HF)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        entries = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None], "AutoConfig": "own.Config"}}
        (tmp_path / name).write_text(json.dumps(entries | {"model_type": "unheard-of"}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    convert(file, tmp_path / "beside", Format.HF, verify=True)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "beside" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "mark").exists()


def test_a_full_disk_for_temporary_files_is_one_line(tmp_path, monkeypatch):
    _, file = file_of(tmp_path, "llama")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    try:
        with pytest.raises(CheckpointError, match=f"out could not be written .*temporary files are in {disk}"):
            convert(file, tmp_path / "out", Format.HF)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert not (tmp_path / "out").exists()
