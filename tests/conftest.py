"""Shared by all tests: a tiny model with a real tokenizer, the demo's model, a small corpus, a Redis server."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from redis_server import RedisServer

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and",
    "then", "saw", "big", "small", "red", "blue", "house", "river", "stone", "light",
)  # fmt: skip


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; made by tools/prepare_demo.py."""
    folder = ROOT / "runs/assets/smollm2-135m-instruct"
    assert folder.is_dir(), "run tools/prepare_demo.py first (tools/test.sh does)"
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of 2 layers (tied embeddings, grouped queries) with a word-level tokenizer, as saved to disk."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_tiny_model(folder: Path, **overrides: object) -> Path:
    """Save a random small Llama and its tokenizer into ``folder``; ``overrides`` change its configuration."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    settings = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """60 documents of 40 to 80 words out of the tiny model's vocabulary, as JSONL."""
    import random

    draw = random.Random(7)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(60):
            handle.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randrange(40, 81)))}) + "\n")
    return path


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A Redis server that all tests share, each with buffers of names of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis") / "server") as server:
        yield server


@pytest.fixture
def rlpt(monkeypatch, capfd):
    """The command in this process, from its arguments to its exit code, standard output and standard error."""
    from megatron_rlpt import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlpt", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code or 0
        return code, *capfd.readouterr()

    return run
