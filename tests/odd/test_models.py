"""Odd model folders through the public commands: trained, converted and planned with, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_on_disk import tensors_in
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_rlpt.models import architecture
from megatron_rlpt.models.rope import Rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def train(rlpt, corpus, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Run two steps of next-token training, which starts no engine."""

    def run(model: Path) -> tuple[int, str, str]:
        settings = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {
                "sources": [{"path": str(corpus)}],
                "suffix_length": 8,
                "min_prefix": 8,
                "max_prefix": 24,
                "shuffle_buffer": 16,
            },
            "candidates": {"rollouts": 0},
            "objective": {"name": "ntp"},
            "train": {"steps": 1, "global_batch": 2, "micro_batch": 2},
            "observe": {"tensorboard": False},
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        return rlpt("train", "-c", path)

    return run


def config(**entries: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def tensors(name: str = SINGLE, **found: torch.Tensor) -> Change:
    """Add a file of tensors, or tensors to the existing file."""

    def change(folder: Path) -> None:
        held = tensors_in(folder) if name == SINGLE else {}
        named = {key.replace("__", "."): tensor for key, tensor in found.items()}
        save_file(held | named, folder / name, metadata={"format": "pt"})

    return change


def shards(*, keep_single: bool = False, overlap: bool = False, index: bool = True) -> Change:
    """Split the model into two files with an index."""

    def change(folder: Path) -> None:
        held = list(tensors_in(folder).items())
        parts = held[:5], held[4:] if overlap else held[5:]
        names = [f"model-{number}-of-00002.safetensors" for number in ("00001", "00002")]
        for name, part in zip(names, parts, strict=True):
            save_file(dict(part), folder / name, metadata={"format": "pt"})
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key, _ in part}
        if index:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        if not keep_single:
            (folder / SINGLE).unlink()

    return change


def together(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a trained head beside tied embeddings": (
        tensors(lm_head__weight=torch.ones(64, 64)),
        ("tie_word_embeddings is true", HEAD, "set tie_word_embeddings to false"),
    ),
    "no head of its own": (config(tie_word_embeddings=False), (HEAD,)),
    "a new file beside an old index and its files": (shards(keep_single=True), (SINGLE, INDEX, "two models")),
    "an index whose files are gone": (
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: "model-00001-of-00001.st"}})),
        ("model-00001-of-00001.st", INDEX, SINGLE),
    ),
    "a tensor in two files": (shards(overlap=True), ("model-00001-of-00002", "model-00002-of-00002", "hold ")),
    "files without an index": (shards(index=False), (SINGLE, INDEX, "copy the complete folder")),
    "rotary frequencies that follow the length": (
        config(rope_scaling={"type": "dynamic", "factor": 2.0}),
        ("rope type 'dynamic' is not supported", "depend on the sequence length"),
    ),
    "rotary settings per kind of layer": (
        config(rope_parameters={"full_attention": YARN}),
        ("separate settings for full_attention",),
    ),
    "quantized": (config(quantization_config={"quant_method": "fp8"}), ("quantized weights are not supported",)),
    "a classifier": (config(architectures=["LlamaForSequenceClassification"]), ("LlamaForSequenceClassification",)),
    "a scale of logits": (config(logit_scale=0.0625), ("logit_scale is 0.0625",)),
    "biases": (config(mlp_bias=True), ("mlp_bias is true",)),
    "further layers for prediction": (config(num_nextn_predict_layers=1), ("num_nextn_predict_layers is 1",)),
    "layers without rotation": (config(no_rope_layers=[1, 0]), ("no_rope_layers",)),
    "not causal": (config(is_causal=False), ("is_causal is False",)),
}


def only_error(err: str, code: int) -> str:
    assert code == 4, err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize("fault", REFUSED)
def test_a_folder_that_would_be_misread_is_refused_before_it_is_converted(rlpt, folder, tmp_path, fault):
    change, parts = REFUSED[fault]
    change(folder)
    code, _, err = rlpt("convert", folder, tmp_path / "out", "--to", "hf")
    line = only_error(err, code)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


DEEP = "[" * 100_000
DAMAGED: dict[str, tuple[Change, str]] = {
    "a family that is a list": (config(model_type=["llama"]), "model_type ['llama'] is not supported"),
    "part of a layer": (config(num_hidden_layers=2.7), "num_hidden_layers is 2.7; allowed: whole numbers"),
    "false in quotes": (config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; allowed: true, false"),
    "an epsilon that is none": (config(rms_norm_eps="nan"), "rms_norm_eps is nan; it must be a number above 0"),
    "no context": (config(max_position_embeddings=0), "max_positions = 0; it must be at least 1"),
    "two lists of experts": (config(num_experts=[4], num_local_experts=[5]), "contradict; keep one"),
    "a deep config": (text("config.json", DEEP), "cannot be read as JSON"),
    "a deep index": (text(INDEX, DEEP), f"{INDEX} is not a readable index"),
    "an index of numbers": (text(INDEX, '{"weight_map": {"a": 3}}'), f"lacks 3, which {INDEX} names"),
    "an index of long names": (
        text(INDEX, json.dumps({"weight_map": {"a": "x" * 300}})),
        f"{INDEX} is not a readable index",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_line(rlpt, folder, tmp_path, damage):
    change, said = DAMAGED[damage]
    change(folder)
    code, _, err = rlpt("convert", folder, tmp_path / "out", "--to", "hf")
    assert said in only_error(err, code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        text("metadata.json", '{"author": "me"}'),
        lambda folder: (folder / "policy").mkdir(),
        text("tokenizer_config.json", DEEP),
        config(torch_dtype=["float32"]),
    ],
    ids=["metadata.json", "a folder named policy", "a deep tokenizer_config.json", "a list of precisions"],
)
def test_what_else_lies_in_a_models_folder_does_not_stop_its_conversion(rlpt, folder, tmp_path, change):
    change(folder)
    code, _, err = rlpt("convert", folder, tmp_path / "out", "--to", "hf")
    assert code == 0, err
    assert tensors_in(tmp_path / "out").keys() == tensors_in(folder).keys()


@pytest.mark.parametrize("command", ["convert", "init"])
def test_a_path_that_is_too_long_is_one_line(rlpt, folder, tmp_path, command):
    options = ["--to", "hf"] if command == "convert" else []
    code, _, err = rlpt(command, tmp_path / ("x" * 300), tmp_path / "out", *options)
    assert "File name too long" in only_error(err, code)
    code, _, err = rlpt(command, folder, tmp_path / ("x" * 300), *options)
    assert code == 2
    assert "File name too long" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("fault", list(REFUSED)[:5])
def test_and_before_it_is_trained(train, folder, fault):
    change, parts = REFUSED[fault]
    change(folder)
    code, _, err = train(folder)
    line = only_error(err, code)
    assert all(part in line for part in parts), line


EXTRA = together(
    *(
        tensors(name, base__weight=torch.ones(2))
        for name in ("consolidated.safetensors", "adapter_model.safetensors", "optimizer.safetensors")
    ),
    lambda folder: (folder / "pytorch_model.bin").write_bytes(b"not a model"),
)


@pytest.mark.parametrize(
    "change",
    [EXTRA, together(shards(), EXTRA), lambda folder: tensors(lm_head__weight=tensors_in(folder)[EMBEDDING])(folder)],
)
def test_files_that_are_no_part_of_the_model_and_a_copy_of_the_head_are_passed_over(
    rlpt, train, folder, tmp_path, change
):
    before = tensors_in(folder)
    change(folder)
    code, _, err = rlpt("convert", folder, tmp_path / "out", "--to", "hf")
    assert code == 0, err
    after = tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    code, _, err = train(folder)
    assert code == 0, err


def test_a_scaling_beside_default_parameters_is_trained_and_exported_with_it(train, folder, tmp_path):
    config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_scaling=YARN, rope_theta=500.0)(folder)
    code, _, err = train(folder)
    assert code == 0, err
    assert "the policy agrees with transformers" in (tmp_path / "run/run.log").read_text()
    raw = json.loads((tmp_path / "run/export/config.json").read_text())
    # Both spellings: earlier releases of transformers know the first two and torch_dtype.
    assert raw["rope_theta"] == 500.0
    assert raw["rope_scaling"].items() >= (YARN | {"type": "yarn"}).items()
    assert raw["rope_parameters"].items() >= (YARN | {"rope_theta": 500.0}).items()
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export").config.rope_parameters
    assert read.items() >= (YARN | {"rope_theta": 500.0}).items()


def test_a_policy_that_was_misread_is_not_trained(train, folder, monkeypatch):
    config(rope_scaling=YARN, rope_theta=500.0)(folder)
    monkeypatch.setattr(architecture, "parse_rope", lambda raw, path, theta: Rope(500.0))
    code, _, err = train(folder)
    line = only_error(err, code)
    assert "does not compute what transformers computes" in line
    assert "rotary frequencies" in line


def test_a_teacher_that_the_policy_could_not_be_is_planned_with(rlpt, tmp_path):
    teacher = tmp_path / "config.json"
    teacher.write_text(json.dumps({"model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42}))
    code, out, err = rlpt(
        *("plan", "--config", "configs/recipes/continual_1b4.yaml", "--gpus", 8, "--judge-gpus", 64, "--json"),
        *("--model", "configs/models/llama-1.4b.json", "--teacher", teacher),
    )
    assert code in (0, 1), err
    (note,) = (line for line in json.loads(out)["warnings"] if "sizes alone" in line)
    assert "gemma2" in note
    assert "num_attention_heads is missing" in note
