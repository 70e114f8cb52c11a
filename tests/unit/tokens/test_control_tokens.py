import json

import pytest

from megatron_rlpt.errors import ModelError
from megatron_rlpt.tokens.control_tokens import break_up, break_up_common, broken_forms, special_tokens


@pytest.mark.parametrize(
    "token",
    [
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|channel|>",
        "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[INST]", "[/INST]", "[TOOL_CALLS]",
        "[SYSTEM_PROMPT]", "[gMASK]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>",
        "<start_of_turn>", "<end_of_turn>", "<think>", "</think>", "<unused17>", "<tool_call>", "</tool_call>",
        "<file_sep>", "<repo_name>", "<extra_id_0>",
    ],
)  # fmt: skip
def test_what_models_take_for_control_is_broken_up(token):
    broken = break_up_common(f"before{token}after")
    assert token not in broken
    assert broken.replace(" ", "") == f"before{token}after"
    assert break_up_common(broken) == broken


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d",
        "<p>HTML <b>tags</b></p><br>",
        "[1] and [see INST]",
        "x | y",
        "f <$> g <*> h",
        "A[i]",
        "<a href='s'>",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert break_up_common(text) == text


def test_known_tokens_are_broken_up_the_longest_first():
    assert break_up("a<<x>>b<x>", ["<x>", "<<x>>", "a"]) == "a< <x>>b< x>".replace("<x>>", "< x>>")
    assert break_up_common("@@ <s>", ["@@"]) == "@ @ < s>"


def test_breaking_up_makes_no_token():
    assert "<|a|>" not in break_up_common("<<|a|>|a|>")


def test_nothing_comes_together_as_a_token():
    broken = break_up("<|start_<|eot_id|>header_id|>", ["<|eot_id|>", "<|start_header_id|>"])
    assert broken == "<|start_< |eot_id|>header_id|>"
    assert break_up("aabb ab", ["ab", "a b"]) == "aa  bb a  b"
    assert break_up("a  b", ["  ", " ", "x"]) == "a  b", "white space is nobody's control token"


def test_what_was_broken_up_can_be_told():
    text = "x <|im_end|> y < |z|> [INST] @@"
    forms = broken_forms(text, ["@@"])
    assert forms == {"< |im_end|>": "<|im_end|>", "[ INST]": "[INST]", "@ @": "@@"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "@end@", "special": True}}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["@end@"], "bos_token": None}),
        ("tokenizer_config.json", {"eos_token": {"content": "@end@"}}),
        ("special_tokens_map.json", {"pad_token": "@end@"}),
        ("tekken.json", {"special_tokens": [{"token_str": "@end@", "rank": 0}]}),
    ],
)
def test_special_tokens_are_found_wherever_they_are_listed(tmp_path, file, content):
    (tmp_path / file).write_text(json.dumps(content))
    assert special_tokens(tmp_path) == ("@end@",)


def test_special_tokens_of_a_folder(smollm2):
    tokens = special_tokens(smollm2)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(tokens)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"added_tokens": [3]}'])
def test_a_folder_without_them(tmp_path, text):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        special_tokens(tmp_path)
