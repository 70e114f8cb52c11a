"""Converter and real Megatron ranks read each other's checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from convert_runs import LAYOUT, STYLES, load_and_save
from layout_runs import Case, configuration, examples, make_policy, save_model
from worlds import run_world

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format
from megatron_rlpt.policy.layout import Layout

sys.path.insert(0, str(Path(__file__).parent.parent / "unit/convert"))
from families_on_disk import OWN, same, save_family, tensors_in

RESAVED = ("llama", "qwen3_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {model_type: save_family(root / model_type, model_type) for model_type in OWN}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> Path:
    """Checkpoints that Megatron ranks wrote in every style after loading converted ones."""
    root = tmp_path_factory.mktemp("checkpoints")
    pairs = []
    for model_type, folder in models.items():
        experts = 4 if "moe" in model_type or model_type == "mixtral" else 1
        convert(folder, root / model_type, Format.MEGATRON, layout=Layout(pipeline=4, expert=experts))
        pairs.append((folder, root / model_type))
    # Loaded in a layout other than that of the converted files, and saved by those ranks.
    resaved = [pair for pair in pairs if pair[0].name in RESAVED]
    others = [pair for pair in pairs if pair not in resaved]
    for found in run_world(LAYOUT.world, _both, others, resaved, root, limit=400, start_group=False):
        assert found == [], "parameters that are not those of the Hugging Face folder"
    return root


def _both(others: list, resaved: list, root: Path) -> list[str]:
    return load_and_save(others, root, []) + load_and_save(resaved, root, list(STYLES))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model_type", RESAVED)
def test_what_megatron_saves_in_tp2_pp2_is_read_in_every_style(saved, models, tmp_path, style, model_type):
    convert(saved / f"{model_type}-{style}", tmp_path / "back", Format.HF, hf_config=models[model_type])
    assert same(tensors_in(tmp_path / "back"), tensors_in(models[model_type]))


def test_the_styles_differ_on_disk(saved):
    """Guards the test above: the styles do lay out the keys differently."""
    from torch.distributed.checkpoint import FileSystemReader

    keys = [
        FileSystemReader(saved / f"qwen3_moe-{style}").read_metadata().state_dict_metadata.keys() for style in STYLES
    ]
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" in keys[0]
    assert "decoder.layers.3.mlp.experts.experts.linear_fc1.weight" in keys[1]
    assert "decoder.layers.3.mlp.experts.experts.2.linear_fc1.weight_w" in keys[2]


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    """With optimizer state, a schedule and a version in addition to the weights."""
    start = save_model(tmp_path / "start", "llama-tied")
    policy = make_policy(configuration(str(start), Case()))
    policy.update(examples(Case(), seed=0))
    weights = {name: tensor.clone() for name, tensor in policy.weights()}
    checkpoints = tmp_path / "run/checkpoints"
    newest = CheckpointStore(checkpoints, keep=2).save(2, {}, policy, start)
    assert newest is not None
    (checkpoints / "step-00000001").mkdir()
    convert(tmp_path / "run", tmp_path / "out", Format.HF, verify=True)
    assert same(tensors_in(tmp_path / "out"), weights)
    trained_from = tensors_in(start)
    assert not all(torch.equal(trained_from[name], weights[name]) for name in weights)
    convert(newest, tmp_path / "again", Format.HF)
    assert same(tensors_in(tmp_path / "again"), weights)
