"""Hugging Face -> Megatron -> Hugging Face, bit for bit, and the same logits on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from families_on_disk import OWN, same, save_family, tensors_in
from transformers import AutoModelForCausalLM

from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models import huggingface
from megatron_rlpt.models.families import FAMILIES
from megatron_rlpt.policy.layout import Layout

pytestmark = pytest.mark.slow


def test_every_family_is_tried_here():
    assert OWN.keys() == FAMILIES.keys()


@pytest.fixture(scope="module", params=OWN)
def folder(request, tmp_path_factory) -> Path:
    return save_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def test_there_and_back_bit_for_bit_with_the_same_logits(folder, tmp_path):
    experts = 2 if FAMILIES[folder.name].expert else 1
    said: list[str] = []
    there, back = tmp_path / "megatron", tmp_path / "hf"
    convert(
        folder,
        there,
        Format.MEGATRON,
        layout=Layout(tensor=2, pipeline=2, expert=experts),
        verify=True,
        say=said.append,
    )
    assert "bit for bit" in "\n".join(said)
    line = next(line for line in said if "logits differ" in line)
    assert float(re.search(r"at most (\S+)", line)[1]) < 1e-4
    assert "argmax equal at 100.0%" in line
    # One file per virtual rank; expert ranks other than the first hold only experts.
    files = sorted(path.name for path in there.glob("*.distcp"))
    ranks = {0, 1, 4, 5} | {2, 6} if experts == 2 else {0, 1, 2, 3}
    assert files == [f"__{rank}_0.distcp" for rank in sorted(ranks)]
    convert(there, back, Format.HF)
    assert same(tensors_in(back), tensors_in(folder))
    kept = json.loads((back / "config.json").read_text())
    # The original entries, and the same under the names of other transformers releases.
    assert kept.items() >= json.loads((folder / "config.json").read_text()).items()
    assert kept["torch_dtype"] == kept["dtype"]
    assert kept["rope_theta"] == kept["rope_parameters"]["rope_theta"]
    AutoModelForCausalLM.from_pretrained(back)


def test_a_wrong_mapping_does_not_pass_verification(tmp_path, monkeypatch):
    """The tensors come back bit for bit, so only the logits show that query and key heads are mixed up."""
    folder = save_family(tmp_path / "llama", "llama", num_key_value_heads=4)
    from megatron_rlpt.convert import megatron_reader
    from megatron_rlpt.convert import megatron_writer as writer

    def swap(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.roll(8, 0)

    write, read = writer.MegatronWriter.write, megatron_reader.MegatronSource.read

    def swapped_write(self, rule, tensors):
        write(self, rule, [swap(t) for t in tensors] if "linear_qkv" in rule.megatron else tensors)

    def swapped_read(self, rule):
        tensors = read(self, rule)
        return [t.roll(-8, 0) for t in tensors] if "linear_qkv" in rule.megatron else tensors

    monkeypatch.setattr(writer.MegatronWriter, "write", swapped_write)
    monkeypatch.setattr(megatron_reader.MegatronSource, "read", swapped_read)
    with pytest.raises(ModelError, match="is not the model in"):
        convert(folder, tmp_path / "out", Format.MEGATRON, verify=True)


def test_a_tensor_that_changed_on_the_way_does_not_pass_verification(tmp_path, monkeypatch):
    folder = save_family(tmp_path / "llama", "llama")
    from megatron_rlpt.convert import megatron_writer as writer

    write = writer.MegatronWriter.write

    def nudged(self, rule, tensors):
        write(self, rule, [t + 1e-6 for t in tensors] if rule.layer == 2 and "linear_fc2" in rule.megatron else tensors)

    monkeypatch.setattr(writer.MegatronWriter, "write", nudged)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight differs from"):
        convert(folder, tmp_path / "out", Format.MEGATRON, verify=True)


@pytest.mark.parametrize("to", [Format.HF, Format.MEGATRON])
def test_precision_is_kept_unless_another_is_asked_for(tmp_path, to):
    fp32 = save_family(tmp_path / "fp32", "qwen2")
    said: list[str] = []
    convert(fp32, tmp_path / "bf16", to, dtype=torch.bfloat16, verify=True, say=said.append)
    assert "rounded to torch.bfloat16" in "\n".join(said)
    convert(tmp_path / "bf16", tmp_path / "kept", Format.HF)
    kept = tensors_in(tmp_path / "kept")
    assert same(kept, {name: tensor.bfloat16() for name, tensor in tensors_in(fp32).items()})
    config = json.loads((tmp_path / "kept/config.json").read_text())
    assert config["dtype"] == "bfloat16", "readers cast to what config.json says"


def test_a_megatron_checkpoint_is_cut_anew(tmp_path):
    folder = save_family(tmp_path / "llama", "llama")
    convert(folder, tmp_path / "one", Format.MEGATRON)
    convert(tmp_path / "one", tmp_path / "four", Format.MEGATRON, layout=Layout(tensor=2, pipeline=2), verify=True)
    assert len(list((tmp_path / "one").glob("*.distcp"))) == 1
    assert len(list((tmp_path / "four").glob("*.distcp"))) == 4
    convert(tmp_path / "four", tmp_path / "back", Format.HF)
    assert same(tensors_in(tmp_path / "back"), tensors_in(folder))


def test_several_shards_have_an_index_and_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 30_000)
    folder = save_family(tmp_path / "qwen3", "qwen3")
    convert(folder, tmp_path / "sharded", Format.HF)
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "sharded" / name).stat().st_size < 60_000 for name in shards)
    assert not list((tmp_path / "sharded").glob("*.part"))
    convert(tmp_path / "sharded", tmp_path / "megatron", Format.MEGATRON)
    monkeypatch.undo()
    convert(tmp_path / "megatron", tmp_path / "back", Format.HF)
    assert same(tensors_in(tmp_path / "back"), tensors_in(folder))
    assert not (tmp_path / "back/model.safetensors.index.json").exists()


def test_the_megatron_folder_needs_nothing_else(tiny_model, tmp_path):
    """Configuration and tokenizer are included, so the source is not needed."""
    convert(tiny_model, tmp_path / "megatron", Format.MEGATRON, layout=Layout(tensor=2))
    (tmp_path / "megatron").rename(tmp_path / "moved")
    convert(tmp_path / "moved", tmp_path / "back", Format.HF)
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(p.name for p in tiny_model.iterdir())
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "moved/hf").glob("*.safetensors"))
