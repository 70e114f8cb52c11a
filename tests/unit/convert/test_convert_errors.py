"""Conversions that fail: one line that names the fix, and no partial output."""

from __future__ import annotations

import json
import pickle
import re
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from families_on_disk import save_family, tensors_in
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_rlpt.convert import convert as module
from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format
from megatron_rlpt.errors import CheckpointError, ConfigError, ModelError, RlptError
from megatron_rlpt.policy.layout import Layout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_family(tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    return save_family(tmp_path_factory.mktemp("model") / "mixtral", "mixtral")


@pytest.fixture
def megatron(model, tmp_path) -> Path:
    convert(model, tmp_path / "megatron", Format.MEGATRON, layout=Layout(tensor=2, pipeline=2))
    return tmp_path / "megatron"


@pytest.fixture
def changed(model, tmp_path):
    """Copy the model with changed entries in its configuration, or with other tensors."""

    def change(tensors=None, **entries) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(model, copy)
        config = json.loads((copy / "config.json").read_text()) | entries
        (copy / "config.json").write_text(json.dumps(config))
        save_file(tensors_in(model) | (tensors or {}), copy / "model.safetensors")
        return copy

    return change


def refused(
    error: type[RlptError], message: str, source: Path, target: Path, to: Format = Format.HF, **options
) -> None:
    with pytest.raises(error, match=message) as caught:
        convert(source, target, to, **options)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not list(target.parent.glob("*.partial"))


def test_an_unknown_family_lists_what_is_supported_and_how_to_add_one(changed, tmp_path):
    refused(
        ModelError,
        r"'gpt2' is not supported; supported: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe \(to add one, add its "
        r"row to CONVENTIONS in megatron_rlpt/models/architecture\.py and its table to FAMILIES in "
        r"megatron_rlpt/models/families\.py",
        changed(model_type="gpt2"),
        tmp_path / "out",
    )


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=3), "--tp is 3; it must divide 4 attention heads and 2 key-value heads.*: --tp may be 1, 2$"),
        (Layout(tensor=4), "--tp is 4; it must divide 2 key-value heads: --tp may be 1, 2$"),
        (Layout(pipeline=3), "--pp is 3; it must divide 4 layers: --pp may be 1, 2, 4$"),
        (Layout(expert=2), "--ep is 2; allowed: 1, because qwen2 models have no experts"),
    ],
)
def test_cuts_that_do_not_divide_the_model(model, tmp_path, layout, message):
    refused(ConfigError, message, model, tmp_path / "out", Format.MEGATRON, layout=layout)


def test_cuts_that_do_not_divide_the_experts(experts, tmp_path):
    message = "--ep is 3; it must divide 4 experts: --ep may be 1, 2, 4$"
    refused(ConfigError, message, experts, tmp_path / "out", Format.MEGATRON, layout=Layout(expert=3))


def test_options_that_have_no_meaning(model, megatron, tmp_path):
    refused(ConfigError, "omit them with --to hf", megatron, tmp_path / "out", layout=Layout(tensor=2))
    refused(ConfigError, "--hf-config is for Megatron checkpoints", model, tmp_path / "out", hf_config=model)


def test_an_output_that_holds_something_is_left_alone(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(model, out, Format.HF)
    before = (out / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="loop is a link that leads to itself; choose another output"):
        convert(model, tmp_path / "loop", Format.MEGATRON)
    with pytest.raises(ConfigError, match="exists and is not an empty folder; choose another output"):
        convert(model, out, Format.MEGATRON)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_megatron_checkpoint_that_does_not_say_which_model_it_is(model, megatron, tmp_path):
    shutil.rmtree(megatron / "hf")
    refused(ConfigError, "give --hf-config with the Hugging Face folder", megatron, tmp_path / "out")
    convert(megatron, tmp_path / "out", Format.HF, hf_config=model)
    assert tensors_in(tmp_path / "out").keys() == tensors_in(model).keys()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"intermediate_size": 64}, r"linear_fc1\.weight is \(4, 96, 32\) where .* asks for \(4, 128, 32\)"),
        ({"num_hidden_layers": 3}, r"is \(4, 32\) where .* asks for \(3, 32\)"),
        ({"vocab_size": 200}, r"word_embeddings\.weight is \(128, 32\) where .* asks for \(200, 32\)"),
        ({"tie_word_embeddings": False}, r"has no tensor 'output_layer\.weight'"),
        ({"model_type": "llama"}, r"holds decoder\.layers\.self_attention\.linear_qkv\.bias, which a llama model"),
    ],
)
def test_a_configuration_of_another_model(megatron, changed, tmp_path, entries, message):
    refused(ModelError, message, megatron, tmp_path / "out", hf_config=changed(**entries))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model.layers.0.extra.weight": torch.zeros(2)},
            r"holds model\.layers\.0\.extra\.weight, which a qwen2 model",
        ),
        ({"model.norm.weight": torch.zeros(31)}, r"model\.norm\.weight is \(31,\) where config\.json asks for \(32,\)"),
        ({"model.norm.weight": torch.full((32,), float("nan"))}, "holds values that are not finite"),
    ],
)
def test_weights_that_are_not_the_configurations(changed, tmp_path, tensors, message):
    refused(ModelError, message, changed(tensors), tmp_path / "out", Format.MEGATRON)


def test_tensors_that_carry_nothing_are_left_out(changed, model, tmp_path):
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": tensors_in(model)["model.embed_tokens.weight"].clone(),
    }
    convert(changed(harmless), tmp_path / "out", Format.HF)
    assert not harmless.keys() & tensors_in(tmp_path / "out").keys()


@pytest.mark.parametrize("head", [torch.ones(50, 32), torch.ones(51, 32)])
def test_a_trained_head_beside_tied_embeddings_is_not_dropped(changed, tmp_path, head):
    source = changed({"lm_head.weight": head})
    refused(ModelError, "set tie_word_embeddings to false to keep it", source, tmp_path / "out", Format.HF)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    if len(head) == 50:
        convert(source, tmp_path / "out", Format.HF)
        assert torch.equal(tensors_in(tmp_path / "out")["lm_head.weight"], head)


def test_layers_in_different_precisions(changed, tmp_path):
    source = changed({"model.layers.1.mlp.down_proj.weight": torch.zeros(32, 48, dtype=torch.bfloat16)})
    refused(ModelError, "give --dtype", source, tmp_path / "out", Format.MEGATRON)
    convert(source, tmp_path / "out", Format.MEGATRON, dtype=torch.float32)


@pytest.mark.parametrize("damage", ["missing", "short", "metadata", "description"])
def test_a_damaged_megatron_checkpoint_names_the_file(megatron, tmp_path, damage):
    file = megatron / {"metadata": ".metadata", "description": "metadata.json"}.get(damage, "__1_0.distcp")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 30 if damage != "short" else 5000])
    refused(CheckpointError, f"{re.escape(file.name)}.*copy the checkpoint again", megatron, tmp_path / "out")


def test_a_checkpoint_with_a_hole(megatron, tmp_path):
    """Uninitialized memory must not pass for weights."""
    metadata = FileSystemReader(megatron).read_metadata()
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks
    del chunks[next(index for index, chunk in enumerate(chunks) if chunk.offsets[0] == 1)]
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    message = r"does not hold all of decoder\.layers\.mlp\.linear_fc2\.weight\[1\]"
    refused(CheckpointError, message, megatron, tmp_path / "out")


@pytest.mark.parametrize("to", [Format.HF, Format.MEGATRON])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(model, tmp_path, to):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        refused(CheckpointError, r"out could not be written \(.*File too large", model, tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_without_room_is_noticed_before_writing(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    refused(CheckpointError, r"disk full: the weights need 0\.1 MiB and .* has 0\.0 MiB free", model, tmp_path / "out")


def test_paths_that_are_no_checkpoint(model, megatron, tmp_path):
    refused(ModelError, "does not exist; give a Hugging Face folder", tmp_path / "nowhere", tmp_path / "out")
    refused(ModelError, "is not a checkpoint: a Hugging Face folder has", tmp_path, tmp_path / "out")
    refused(ModelError, "is not a GGUF file", model / "config.json", tmp_path / "out")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless/config.json").write_text((model / "config.json").read_text())
    refused(ModelError, r"no \*\.safetensors file", tmp_path / "weightless", tmp_path / "out")
    described = json.loads((megatron / "metadata.json").read_text()) | {"sharded_backend": "zarr"}
    (megatron / "metadata.json").write_text(json.dumps(described))
    refused(ModelError, "is stored as 'zarr'; supported: 'torch_dist'", megatron, tmp_path / "out")


def test_an_unfinished_checkpoint_of_a_run(megatron, tmp_path):
    step = tmp_path / "run/checkpoints/step-00000004"
    step.mkdir(parents=True)
    megatron.rename(step / "policy")
    refused(CheckpointError, "has no COMPLETE marker", step, tmp_path / "out")
    refused(CheckpointError, "has no COMPLETE marker", tmp_path / "run", tmp_path / "out")


def test_a_save_folder_of_megatron_lm_stands_for_its_latest_iteration(model, megatron, tmp_path):
    saves = tmp_path / "saves"
    saves.mkdir()
    (saves / "latest_checkpointed_iteration.txt").write_text("20\n")
    refused(ModelError, "names '20', and .*iter_0000020 is not a Megatron distributed", saves, tmp_path / "out")
    megatron.rename(saves / "iter_0000020")
    convert(saves, tmp_path / "out", Format.HF)
    assert tensors_in(tmp_path / "out").keys() == tensors_in(model).keys()
