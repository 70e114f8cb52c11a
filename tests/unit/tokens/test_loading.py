"""A tokenizer is read once, then without ``transformers`` and torch, and never from the files of another one."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from without_torch import run_without_torch

from megatron_rlpt.tokens import loading
from megatron_rlpt.tokens.loading import tokenizer_facts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of a process without torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "sys", SimpleNamespace(modules={}))
    return tmp_path / "cache/megatron_rlpt/tokenizers"


@pytest.fixture
def loads(monkeypatch):
    """Folders whose tokenizers ``transformers`` has loaded."""
    seen, load = [], loading._load_facts
    monkeypatch.setattr(loading, "_load_facts", lambda path: seen.append(path) or load(path))
    return seen


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


SHOW = """
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
tokenizer = PolicyTokenizer(sys.argv[1])
print(tokenizer.encode(sys.argv[2]), tokenizer.size, tokenizer.bos_id, tokenizer.control_tokens)
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_a_judge_worker_reads_the_tokenizer_without_torch(cache, smollm2):
    from megatron_rlpt.tokens.tokenizer import PolicyTokenizer

    text = "One fish <|im_end|> \u9c7c."
    here = PolicyTokenizer(smollm2)
    done = run_without_torch(SHOW, str(smollm2), text)
    assert done.returncode == 0, done.stderr
    shown = [str(value) for value in (here.encode(text), here.size, here.bos_id, here.control_tokens)]
    assert done.stdout.strip() == " ".join(shown)


def test_facts_are_those_that_transformers_gives(cache, loads, folder):
    loaded = tokenizer_facts(folder)
    assert tokenizer_facts(folder) == loaded == loading._load_facts(folder)
    assert loads == [folder, folder]  # the second is that of the line above


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "added_tokens.json"])
def test_a_changed_file_is_read_again(cache, loads, folder, name):
    tokenizer_facts(folder)
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    if name == "tokenizer.json":
        values["added_tokens"].append(
            values["added_tokens"][0] | {"id": len(values["model"]["vocab"]), "content": "<x>"}
        )
    (folder / name).write_text(json.dumps(values, indent=7))
    tokenizer_facts(folder)
    assert len(loads) == 2


def test_another_folder_and_another_release_are_read_again(cache, loads, folder, tmp_path, monkeypatch):
    tokenizer_facts(folder)
    tokenizer_facts(shutil.copytree(folder, tmp_path / "deepseek-ai"))
    monkeypatch.setattr(loading, "_version", lambda package: "another")
    tokenizer_facts(folder)
    assert len(loads) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"layout": {}}', "\x00"])
def test_a_damaged_file_of_the_cache_is_replaced(cache, loads, folder, content):
    facts = tokenizer_facts(folder)
    (file,) = cache.iterdir()
    file.write_text(content)
    assert tokenizer_facts(folder) == facts
    assert tokenizer_facts(folder) == facts
    assert len(loads) == 2


def test_a_cache_that_cannot_be_written_stops_nobody(cache, loads, folder):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    assert tokenizer_facts(folder) == tokenizer_facts(folder)
    assert len(loads) == 2


def test_the_cache_stays_small(cache, folder, tmp_path, monkeypatch):
    facts = loading._load_facts(folder)
    monkeypatch.setattr(loading, "_load_facts", lambda path: facts)
    for number in range(20):
        tokenizer_facts(shutil.copytree(folder, tmp_path / str(number)))
    assert len(list(cache.iterdir())) == 16
