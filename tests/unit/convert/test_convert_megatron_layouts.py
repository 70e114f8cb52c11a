"""Checkpoints that Megatron-Core itself writes, with layers and keys that the converter does not write."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_on_disk import same, save_family, tensors_in
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_plainly

from megatron_rlpt.config import Dtype
from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format
from megatron_rlpt.convert.source import HuggingFaceSource
from megatron_rlpt.errors import ConfigError, ModelError
from megatron_rlpt.models.families import EMBEDDING, OUTPUT, mapping
from megatron_rlpt.policy.device_runtime import DeviceRuntime

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return save_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def megatron_model(folder: Path) -> Any:
    """Megatron-Core's own layers without Transformer Engine, with the weights of ``folder``."""
    runtime = DeviceRuntime()
    runtime.init_distributed()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_rlpt.policy.model import model_arguments, transformer_config

    source = HuggingFaceSource(folder)
    arch = source.arch
    with runtime.megatron(), torch.no_grad():
        config = transformer_config(arch, Dtype.fp32, runtime)
        experts = arch.experts.count if arch.experts else None
        spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
        model = GPTModel(config=config, transformer_layer_spec=spec, **model_arguments(arch))
        parameters = dict(model.named_parameters())
        for rule in mapping(arch):
            parameters.pop(rule.megatron).copy_(rule.merge(arch, source.read(rule)))
        assert not parameters.keys() - {EMBEDDING, OUTPUT}
    return model


def save_distributed(model: Any, folder: Path, prefix: str = "", **metadata: bool) -> Path:
    """Write as ``--ckpt-format torch_dist``."""
    from megatron_rlpt.policy.sharded_checkpoint import ShardedWriting

    folder.mkdir(parents=True)
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    with DeviceRuntime().megatron():
        state = model.sharded_state_dict(prefix=prefix, metadata=ensure_metadata_has_dp_cp_group(metadata))
        writing = ShardedWriting(state, folder, snapshot=False)
        _, result = writing.write()
        writing.conclude([result])
    return folder


@pytest.mark.parametrize("metadata", [(), ("non_homogeneous_layers",), ("singleton_local_shards",)])
def test_layers_without_transformer_engine_come_back_and_pass_verification(folder, tmp_path, metadata):
    saved = save_distributed(megatron_model(folder), tmp_path / "saved", **dict.fromkeys(metadata, True))
    convert(saved, tmp_path / "out", Format.HF, hf_config=folder, verify=True)
    assert same(tensors_in(tmp_path / "out"), tensors_in(folder))


def test_a_wrong_order_of_heads_in_the_source_does_not_pass(tmp_path, monkeypatch):
    """Compare with Megatron's reading of the stored tensor, not with our split and merge."""
    folder = save_family(tmp_path / "llama", "llama", num_key_value_heads=4)  # so that query, key and value are alike
    saved = save_distributed(megatron_model(folder), tmp_path / "saved")

    def mixed_up(arch):
        for rule in mapping(arch):
            if "linear_qkv.weight" in rule.megatron:
                rule = replace(rule, split=lambda arch, tensor, right=rule.split: right(arch, tensor)[::-1])
            yield rule

    monkeypatch.setattr("megatron_rlpt.convert.convert.mapping", mixed_up)
    monkeypatch.setattr("megatron_rlpt.convert.verify.mapping", mixed_up)
    with pytest.raises(ModelError, match="is not the model in"):
        convert(saved, tmp_path / "out", Format.HF, hf_config=folder, verify=True)


def test_a_checkpoint_of_nemo_2(folder, tmp_path):
    save_distributed(megatron_model(folder), tmp_path / "nemo/weights", prefix="module.")
    (tmp_path / "nemo/context").mkdir()
    (tmp_path / "nemo/context/model.yaml").write_text("_target_: os.system")
    with pytest.raises(ConfigError, match="does not say which model it is; give --hf-config"):
        convert(tmp_path / "nemo", tmp_path / "out", Format.HF)
    convert(tmp_path / "nemo", tmp_path / "out", Format.HF, hf_config=folder, verify=True)
    assert same(tensors_in(tmp_path / "out"), tensors_in(folder))


@pytest.mark.parametrize("names", ["sequential", "grouped"])
def test_torch_dcp(folder, tmp_path, names):
    """Torch's own format has the module's own names and no ``metadata.json`` or ``common.pt``."""
    state = {name: tensor for name, tensor in megatron_model(folder).state_dict().items() if tensor is not None}
    if names == "grouped":  # as Transformer Engine's layers call them
        fused = (
            (r"input_layernorm\.", "self_attention.linear_qkv.layer_norm_"),
            (r"local_experts\.(\d+)\.(linear_fc[12])\.weight", r"\2.weight\1"),
        )
        for pattern, other in fused:
            state = {re.sub(pattern, other, name): tensor for name, tensor in state.items()}
    saved = tmp_path / "saves/iter_0000007"
    save_plainly(
        {"model": state, "args": None, "iteration": 7, "rng_state": [torch.zeros(4, dtype=torch.uint8)]},
        storage_writer=FileSystemWriter(saved),
    )
    (tmp_path / "saves/latest_checkpointed_iteration.txt").write_text("7")
    assert not (saved / "metadata.json").exists()
    convert(tmp_path / "saves", tmp_path / "out", Format.HF, hf_config=folder, verify=True)
    assert same(tensors_in(tmp_path / "out"), tensors_in(folder))


@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_00_000", "mp_rank_00_000_000"])
def test_the_legacy_format_is_named_and_what_to_do_and_nothing_is_unpickled(tmp_path, rank):
    legacy = tmp_path / "saves/iter_0000100" / rank
    legacy.mkdir(parents=True)
    (legacy / "model_optim_rng.pt").write_bytes(b"never read")
    (tmp_path / "saves/latest_checkpointed_iteration.txt").write_text("100")
    for given in (tmp_path / "saves", tmp_path / "saves/iter_0000100"):
        with pytest.raises(ModelError, match=f"legacy format .{rank}.*--ckpt-convert-format torch_dist"):
            convert(given, tmp_path / "out", Format.HF)


def test_a_tracker_that_says_nothing_sensible(folder, tmp_path):
    saves = tmp_path / "saves"
    saves.mkdir()
    for said in ("²", "../../x", "", "9" * 400):
        (saves / "latest_checkpointed_iteration.txt").write_text(said)
        with pytest.raises(ModelError, match="is not a Megatron distributed checkpoint"):
            convert(saves, tmp_path / "out", Format.HF, hf_config=folder)
