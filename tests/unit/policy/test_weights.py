from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from llamas import VARIANTS, load_llama, make_examples, make_policy, same, save_llama, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_rlpt.config import Dtype
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.models import huggingface
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import expected_shapes
from megatron_rlpt.models.huggingface import WeightFolder, export_folder, without_extras
from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.model import build_model
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.weights import load_weights
from megatron_rlpt.types import Candidate, Episode, Source


@pytest.fixture(scope="module", params=VARIANTS)
def llama(request, tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / request.param, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "tied")


def transformers_logprobs(model: LlamaForCausalLM, example: Example) -> torch.Tensor:
    (candidate,) = example.sequences
    tokens = torch.tensor([example.episode.prefix + candidate.tokens])
    with torch.no_grad():
        everywhere = model(tokens).logits[0].log_softmax(-1)
    first = len(example.episode.prefix) - 1
    return everywhere[first:-1].gather(1, torch.tensor(candidate.tokens)[:, None]).squeeze(1)


def all_logprobs(policy: Policy, prefix: tuple[int, ...], vocabulary: int) -> torch.Tensor:
    """Log-probability of every token of the vocabulary after ``prefix``."""
    episode = Episode("e", prefix, (0,), "c", "d", 0)
    rows = [Example(episode, (Candidate(Source.ROLLOUT, (token,)),), (0,)) for token in range(vocabulary)]
    return policy.logprobs(rows).squeeze(1)


def test_weights_go_through_megatron_and_back_bit_for_bit(llama):
    out = weights_of(make_policy(llama))
    assert same(out, load_file(llama / "model.safetensors"))


def test_expected_shapes_are_those_of_the_saved_folder_and_of_the_stream(llama):
    arch = read_architecture(llama)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(llama / "model.safetensors").items()}
    assert expected_shapes(arch) == saved
    streamed = [(name, tuple(tensor.shape)) for name, tensor in make_policy(llama).weights()]
    assert streamed == list(expected_shapes(arch).items()), "names, shapes and order"
    assert [name for name, _ in WeightFolder(llama).stream(arch)] == list(expected_shapes(arch))


def test_logprobs_equal_those_of_transformers(llama):
    policy, reference = make_policy(llama), load_llama(llama)
    examples = make_examples(6, width=1)
    ours = policy.logprobs(examples)
    for row, example in zip(ours, examples, strict=True):
        theirs = transformers_logprobs(reference, example)
        assert (row[: len(theirs)] - theirs).abs().max() < 1e-4
        assert (row[len(theirs) :] == 0).all()
    prefix = examples[0].episode.prefix
    with torch.no_grad():
        full = reference(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
    assert (all_logprobs(policy, prefix, len(full)) - full).abs().max() < 1e-4


def test_llama3_scaling_changes_long_range_frequencies(tmp_path):
    """Guards the parity test above: with these lengths, ignoring the scaling would show."""
    scaled = save_llama(tmp_path / "scaled", **VARIANTS["tied-llama3-rope"])
    config = json.loads((scaled / "config.json").read_text())
    plain = tmp_path / "plain"
    shutil.copytree(scaled, plain)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (plain / "config.json").write_text(json.dumps(config))
    examples = make_examples(6, width=1)
    difference = (make_policy(scaled).logprobs(examples) - make_policy(plain).logprobs(examples)).abs().max()
    assert difference > 1e-3


def test_a_real_model_has_the_logits_of_transformers(smollm2):
    text = "The water of the river runs down to the sea. In spring the snow of the mountains melts, and then the river"
    tokens = torch.tensor([AutoTokenizer.from_pretrained(smollm2).encode(text)])
    with torch.no_grad():
        theirs = load_llama(smollm2)(tokens).logits
    arch, runtime = read_architecture(smollm2), DeviceRuntime()
    runtime.init_distributed()
    (model,) = model_chunks = build_model(arch, Dtype.fp32, runtime)
    load_weights(model_chunks, arch, Layout(), smollm2)
    with torch.no_grad(), runtime.megatron():
        ours = model(tokens, torch.arange(tokens.shape[1])[None], None) @ model.output_weight().t()
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    next_token = theirs.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
    assert next_token.mean() > -5, "a trained model, not noise that agrees with itself"


def test_an_export_loads_in_transformers_with_the_policys_weights(tiny_model, tmp_path):
    policy = make_policy(tiny_model)
    policy.update(make_examples())
    export_folder(policy.weights(), tiny_model, tmp_path / "export")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    expected = weights_of(policy)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(
        expected["model.norm.weight"], load_file(tiny_model / "model.safetensors")["model.norm.weight"]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.encode("the cat sat") == AutoTokenizer.from_pretrained(tiny_model).encode("the cat sat")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == sorted(p.name for p in tiny_model.iterdir())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_an_export_says_its_own_precision_not_that_of_the_starting_model(tmp_path, key):
    """transformers and vLLM cast to what config.json names; fp32 weights would be rounded on loading."""
    start = save_llama(tmp_path / "start", dtype=torch.bfloat16)
    config = json.loads((start / "config.json").read_text())
    config[key] = config.pop("dtype")
    assert config[key] == "bfloat16"
    (start / "config.json").write_text(json.dumps(config))
    policy = make_policy(start)
    policy.update(make_examples())
    export_folder(policy.weights(), start, tmp_path / "export")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights_of(policy).items())


def test_a_bf16_policy_exports_bf16(tied, tmp_path):
    policy = make_policy(tied, model={"dtype": Dtype.bf16})
    export_folder(policy.weights(), tied, tmp_path / "export")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    saved = load_file(tied / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in saved.items())


def test_an_export_in_several_files_has_an_index_and_loads_everywhere(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 10_000)
    policy = make_policy(tied)
    export_folder(policy.weights(), tied, tmp_path / "export")
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "export/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in weights_of(policy).values())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights_of(policy).items())
    assert same(weights_of(make_policy(tmp_path / "export")), weights_of(policy))
    # The old index of a start in several files must not survive beside one file.
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 1 << 30)
    export_folder(policy.weights(), tmp_path / "export", tmp_path / "again")
    assert [path.name for path in sorted((tmp_path / "again").glob("model*"))] == ["model.safetensors"]


def test_a_second_export_takes_the_place_of_the_first_which_is_kept(tied, tmp_path):
    policy = make_policy(tied)
    export_folder(policy.weights(), tied, tmp_path / "export")
    (tmp_path / "export/notes.txt").write_text("mine")
    policy.update(make_examples())
    export_folder(policy.weights(), tied, tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export.old-1"]
    assert same(load_file(tmp_path / "export/model.safetensors"), weights_of(policy))
    assert not (tmp_path / "export/notes.txt").exists()
    assert (tmp_path / "export.old-1/notes.txt").read_text() == "mine"


def test_an_export_that_fails_midway_leaves_the_old_one_as_it_was(tied, tmp_path):
    export_folder(WeightFolder(tied).stream(read_architecture(tied)), tied, tmp_path / "export")

    def broken():
        yield "model.embed_tokens.weight", torch.zeros(2, 2)
        raise RuntimeError("the device went away")

    with pytest.raises(RuntimeError, match="went away"):
        export_folder(broken(), tied, tmp_path / "export")
    assert same(load_file(tmp_path / "export/model.safetensors"), load_file(tied / "model.safetensors"))


def test_an_export_onto_a_full_disk_says_so_in_one_line_and_keeps_the_old_one(tied, tmp_path):
    export_folder(WeightFolder(tied).stream(read_architecture(tied)), tied, tmp_path / "export")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            export_folder(WeightFolder(tied).stream(read_architecture(tied)), tied, tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value).startswith(f"{tmp_path}/export could not be written")
    assert "File too large" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert same(load_file(tmp_path / "export/model.safetensors"), load_file(tied / "model.safetensors"))


def test_an_engine_sees_nothing_that_is_no_part_of_the_model(tied, tmp_path):
    """Without an index, vLLM loads every safetensors file, and a consolidated one first."""
    with without_extras(tied) as same_folder:
        assert same_folder == tied
    folder = tmp_path / "model"
    shutil.copytree(tied, folder)
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"other": torch.ones(1)}, folder / name)
    with without_extras(folder) as served:
        assert sorted(path.name for path in served.iterdir()) == sorted(path.name for path in tied.iterdir())
        assert same(load_file(served / "model.safetensors"), load_file(tied / "model.safetensors"))
    assert not served.exists()
