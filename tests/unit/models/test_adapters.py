"""LoRA adapters: what is read from their folder, and folders that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.adapters import read_adapter, special_tokens_of, whole_model


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def adapter(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | values))
    return folder


def test_an_adapter_has_its_base_and_room_for_its_rank(base, tmp_path):
    for rank, room in ((1, 1), (8, 8), (9, 16), (512, 512)):
        found = read_adapter(adapter(tmp_path / "judge", r=rank, base_model_name_or_path=str(base)))
        assert (found.base, found.room, found.name) == (base, room, "judge")
    assert whole_model(tmp_path / "judge") == base
    assert special_tokens_of(str(tmp_path / "judge")) == ("<end>",), "those of its base"


def test_an_adapter_is_served_under_another_name_than_its_base(base, tmp_path):
    assert read_adapter(adapter(tmp_path / "runs/base", base_model_name_or_path=str(base))).name == "base-adapter"


def test_a_whole_model_is_none(base):
    assert read_adapter(base) is None
    assert read_adapter("") is None
    assert whole_model(base) == base


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; allowed: LORA"),
        ({"r": 600}, "has r 600; allowed: 1 to 512"),
        ({"r": 0}, "has r 0; allowed"),
        ({"r": "8"}, "has r '8'; allowed"),
        ({"base_model_name_or_path": "owner/name"}, "'owner/name'; set it to the local Hugging Face folder"),
        ({"base_model_name_or_path": None}, "has base_model_name_or_path None; set it to"),
    ],
)
def test_what_cannot_be_served_is_named(base, tmp_path, values, said):
    folder = adapter(tmp_path / "a", **{"base_model_name_or_path": str(base)} | values)
    with pytest.raises(ModelError) as caught:
        read_adapter(folder)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_a_damaged_adapter_is_one_line(tmp_path):
    for text in ("{", "[]"):
        (adapter(tmp_path / "a") / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
            read_adapter(tmp_path / "a")


def test_where_the_base_is_elsewhere_its_special_tokens_are_unknown(tmp_path):
    assert special_tokens_of(str(adapter(tmp_path / "a", base_model_name_or_path="/elsewhere"))) == ()
    assert special_tokens_of("") == ()
