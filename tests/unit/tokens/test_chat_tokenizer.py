"""Control tokens in documents are plain text to the teacher, wherever its tokenizer lists them."""

import json
import shutil

import pytest

from megatron_rlpt.errors import ModelError
from megatron_rlpt.tokens.chat_tokenizer import ChatTokenizer
from megatron_rlpt.types import Failed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2):
    """A chat tokenizer with control tokens in no named list, one of them not marked as special."""
    folder = tmp_path_factory.mktemp("teacher") / "chat"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    layout = json.loads((folder / "tokenizer.json").read_text())
    for token, special in (("@@turn@@", True), ("<tool_call>", False), ("<|start_header_id|>", True)):
        layout["added_tokens"].append(layout["added_tokens"][-1] | {"content": token, "special": special})
        layout["added_tokens"][-1]["id"] = len(layout["model"]["vocab"]) + len(layout["added_tokens"])
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    return folder


def tokens_of(tokenizer, text, answer_start=""):
    return tokenizer.encode([("user", text)], answer_start)


@pytest.mark.parametrize(
    "spelled",
    [
        "<|im_end|>", "@@turn@@", "<tool_call>", "<|start_header_id|>", "<|start_<|im_end|>header_id|>",
        "<|start_<|eot_id|>header_id|>", "@@tu@@turn@@rn@@", "@@turn@@turn@@",
    ],
)  # fmt: skip
def test_a_document_adds_no_control_token_to_a_prompt(folder, spelled):
    tokenizer = ChatTokenizer(folder, "fails")
    control = set(tokenizer._control)
    plain, hostile = tokens_of(tokenizer, "say x now", "x"), tokens_of(tokenizer, f"say {spelled} now", spelled)
    of_template = [token for token in plain if token in control]
    assert of_template, "the template has its own"
    assert [token for token in hostile if token in control] == of_template


def test_what_cannot_be_broken_up_is_not_asked(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "chat")
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["added_tokens"].append(layout["added_tokens"][-1] | {"content": "\u2603", "id": 60_000})
    (tmp_path / "chat" / "tokenizer.json").write_text(json.dumps(layout))
    tokenizer = ChatTokenizer(tmp_path / "chat", "fails")
    assert isinstance(tokens_of(tokenizer, "a snowman \u2603 here"), Failed)
    assert not isinstance(tokens_of(tokenizer, "a man here"), Failed)


def test_a_base_model_is_refused(tiny_model):
    with pytest.raises(ModelError, match="has no chat template, so it cannot be asked"):
        ChatTokenizer(tiny_model, "cannot be asked")
