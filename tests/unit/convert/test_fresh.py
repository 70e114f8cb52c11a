"""``rlpt init``: weights with the distribution of Megatron's, in a folder that every reader loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_model

from megatron_rlpt.config import Dtype
from megatron_rlpt.convert import fresh
from megatron_rlpt.convert.fresh import fresh_weights
from megatron_rlpt.models import huggingface
from megatron_rlpt.models.architecture import CONVENTIONS, Architecture, parse_architecture
from megatron_rlpt.models.families import mapping
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.model import build_model

pytestmark = pytest.mark.slow

SHARED = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.03,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def config_of(folder: Path, model_type: str, **overrides: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    moe = {} if CONVENTIONS[model_type].experts else {key: None for key in SHARED if "expert" in key}
    moe |= {"moe_intermediate_size": 96} if model_type == "qwen3_moe" else {}
    raw = {key: value for key, value in (SHARED | moe | {"model_type": model_type} | overrides).items() if value}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder / "config.json"


def arch_of(folder: Path, model_type: str) -> Architecture:
    path = config_of(folder, model_type)
    return parse_architecture(json.loads(path.read_text()), path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture
def rlpt_init(rlpt, tokenizer):
    return lambda config, out, *options: rlpt("init", config, out, "--tokenizer", tokenizer, *options)


def qwen_tokenizer(folder: Path) -> Path:
    """Bytes as tokens, of the class that transformers gives every Qwen model."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    Qwen2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("model_type", CONVENTIONS)
def test_every_tensor_is_distributed_as_megatron_initialises_it(tmp_path, model_type):
    """Against Megatron's own model of the same configuration, tensor by tensor."""
    arch = arch_of(tmp_path, model_type)
    ours = dict(fresh_weights(arch, 1, torch.float32))
    runtime = DeviceRuntime()
    runtime.init_distributed()
    torch.manual_seed(0)
    (model,) = build_model(arch, Dtype.fp32, runtime)
    theirs = dict(model.named_parameters())
    assert sorted(rule.megatron for rule in mapping(arch)) == sorted(theirs)
    for rule in mapping(arch):
        for name, expected in zip(rule.hf, rule.split(arch, theirs[rule.megatron].detach()), strict=True):
            drawn = ours[name]
            assert drawn.shape == expected.shape, name
            if expected.unique().numel() == 1:
                assert torch.equal(drawn, expected), name
                continue
            # Four standard errors of a standard deviation, of a mean, of a fourth moment.
            tolerance = 4 / math.sqrt(drawn.numel())
            assert drawn.std() / expected.std() == pytest.approx(1, abs=tolerance), name
            assert drawn.mean().abs() < tolerance * expected.std(), name
            kurtosis = ((drawn - drawn.mean()) / drawn.std()).pow(4).mean()
            assert kurtosis == pytest.approx(3, abs=5 * tolerance), name


@pytest.mark.parametrize("model_type", CONVENTIONS)
def test_transformers_loads_the_folder_and_its_loss_is_that_of_a_guess(tmp_path, rlpt, tokenizer, model_type):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    own = qwen_tokenizer(tmp_path / "qwen") if "qwen" in model_type else tokenizer
    code, printed, err = rlpt("init", config_of(tmp_path / "c", model_type), out, "--tokenizer", own, "--dtype", "fp32")
    assert code == 0, err
    assert f"wrote {out}: fresh {model_type}" in printed
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    tokens = torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, labels=tokens).loss
    assert float(loss) == pytest.approx(math.log(320), abs=0.25)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(own).get_vocab()


def test_the_seed_alone_decides_and_not_how_weights_are_cut_into_files(tmp_path, rlpt_init, monkeypatch):
    config = config_of(tmp_path, "llama")
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    rlpt_init(config, whole, "--seed", 7)
    rlpt_init(config, other, "--seed", 8)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 1 << 18)
    rlpt_init(config, parts, "--seed", 7)
    assert len(list(parts.glob("*.safetensors"))) > 3
    left, right = weights_in(whole), weights_in(parts)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert {tensor.dtype for tensor in left.values()} == {torch.bfloat16}
    drawn = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(left[drawn], weights_in(other)[drawn])
    assert not torch.equal(left[drawn], left[drawn.replace(".0.", ".1.")])


def test_the_folder_says_what_it_is_and_takes_control_tokens_from_the_tokenizer(tmp_path, rlpt_init, tokenizer):
    config = config_of(tmp_path, "llama", bos_token_id=9, eos_token_id=[2, 5])
    (tokenizer / "generation_config.json").write_text('{"temperature": 0.6}')
    code, printed, _ = rlpt_init(config, tmp_path / "out")
    assert code == 0
    assert "bos_token_id is 1, as in the tokenizer, not 9" in printed
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 5])
    assert written["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "out/generation_config.json").exists(), "sampling defaults of another model"


def test_a_folder_with_its_own_tokenizer_needs_no_other(tmp_path, rlpt, tokenizer):
    assert rlpt("init", tokenizer, tmp_path / "out")[0] == 0
    assert weights_in(tmp_path / "out").keys() == weights_in(tokenizer).keys()


def one_line(err: str) -> str:
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, rlpt_init, rlpt, tokenizer, monkeypatch):
    out = tmp_path / "out"

    def refused(config: Path, expected_code: int, say: str, target: Path = out, **_: object) -> None:
        code, _, err = rlpt_init(config, target)
        assert code == expected_code
        assert say in one_line(err)
        assert not out.exists()

    refused(config_of(tmp_path / "a", "llama", vocab_size=16), 4, "has 24 tokens and")
    refused(config_of(tmp_path / "b", "llama", initializer_range=-1), 4, "initializer_range is -1.0")
    refused(tmp_path / "none", 4, "give a config.json or a folder with one")
    broken = tmp_path / "broken.json"
    for content in ("[1]", "{", "[" * 100_000):
        broken.write_text(content)
        refused(broken, 4, "broken.json")
    refused(config_of(tmp_path / "d", "qwen2"), 4, "as Qwen2Tokenizer with a qwen2 model")
    good = config_of(tmp_path / "c", "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    refused(good, 2, "is not an empty folder", tmp_path / "full")
    assert (tmp_path / "full/file").read_text() == "mine"
    code, _, err = rlpt("init", good, out, "--tokenizer", tmp_path / "a")
    assert (code, "tokenizer in" in one_line(err)) == (4, True)
    monkeypatch.setattr(fresh.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused(good, 8, "disk full: the weights need")


def test_code_of_its_own_is_refused_by_the_name_of_the_file_that_was_given(rlpt_init, tmp_path):
    path = config_of(tmp_path / "own", "llama", auto_map={"AutoConfig": "own.Config"})
    code, _, err = rlpt_init(path, tmp_path / "out")
    assert code == 4
    assert err.startswith(f"error: {path}: auto_map asks to run code of its own (own.Config)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "[" * 100_000), ("tokenizer_config.json", "[]"), ("config.json", '{"eos_token_id": [0, "a"]}')],
)
def test_a_tokenizers_folder_that_is_damaged_is_one_line(rlpt, tokenizer, tmp_path, name, content):
    damaged = shutil.copytree(tokenizer, tmp_path / "damaged")
    if name == "config.json":
        content = json.dumps(json.loads((damaged / name).read_text()) | json.loads(content))
    (damaged / name).write_text(content)
    code, _, err = rlpt("init", config_of(tmp_path / "model", "llama"), tmp_path / "out", "--tokenizer", damaged)
    assert code == 4
    assert err.startswith(f"error: the tokenizer in {damaged} cannot be loaded: ")
    assert len(err.splitlines()) == 1


def test_what_is_said_holds_no_escapes(rlpt_init, tmp_path):
    code, out, err = rlpt_init(config_of(tmp_path / "model", "llama"), tmp_path / "out\x1b[31m")
    assert code == 0, err
    assert "\x1b" not in out
