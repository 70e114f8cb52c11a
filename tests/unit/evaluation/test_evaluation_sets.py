"""Sets of prompts as episodes, and the models that a command names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_tokens import BYTES

from megatron_rlpt.config import load_config
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation.models import find_models
from megatron_rlpt.evaluation.prompt_sets import load_sets


class ByteTokenizer:
    """One token per byte."""

    bos_id = 1
    vocabulary = BYTES.vocabulary

    def encode(self, text, control_tokens=False):
        return list(text.encode())

    def starts_character(self, token):
        return not 0x80 <= token < 0xC0

    def continue_with(self, before, text, control=()):
        return list(text.encode())


def config(tmp_path, *overrides):
    base = ["run.dir=r", "model.path=m", "train.steps=1", "data.sources=[{path: c}]", "data.max_prefix=8",
            "data.min_prefix=4", "data.suffix_length=4", "optimizer.warmup_steps=0"]  # fmt: skip
    return load_config(None, [*base, *overrides])


def records(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_end_where_they_are_continued(tmp_path):
    rows = [{"text": "short", "label": "a"}, {"text": "a long \u00e9\u00e9\u00e9prompt", "reference": " yes"}]
    path = records(tmp_path / "p.jsonl", *rows)
    (found,) = load_sets(config(tmp_path, f"evaluation.sets=[{{name: mine, path: {path}}}]"), ByteTokenizer())
    first, second = found.episodes
    assert bytes(first.prefix) == b"short"
    assert (first.suffix, found.labels) == ((), ("a", ""))
    assert bytes(second.prefix) == "\u00e9prompt".encode()
    assert bytes(second.suffix) == b" yes"
    # It does not begin its text, so a tokenizer must not treat it as the beginning.
    assert (first.offset, second.offset > len(second.prefix)) == (len(first.prefix), True)
    assert found.measures == ("quality", "safety")
    assert first.id != second.id


def test_with_bos_only_where_the_text_begins(tmp_path):
    path = records(tmp_path / "p.jsonl", {"text": "abc"}, {"text": "abcdefghijk"})
    settings = config(tmp_path, f"evaluation.sets=[{{name: mine, path: {path}}}]", "data.add_bos=true")
    first, second = load_sets(settings, ByteTokenizer())[0].episodes
    assert first.prefix == (1, *b"abc")
    assert bytes(second.prefix) == b"defghijk"


def test_held_out_documents_and_further_ones_are_cut_alike(tmp_path):
    path = records(tmp_path / "h.jsonl", *({"text": letter * 20} for letter in "abc"))
    settings = config(
        tmp_path, f"data.heldout=[{{path: {path}}}]", "evaluation.prefixes=2", "evaluation.measures=[perplexity]",
        f"evaluation.sets=[{{name: more, format: heldout, path: {path}}}]",
    )  # fmt: skip
    first, more = load_sets(settings, ByteTokenizer())
    assert (first.name, len(first.episodes), first.measures) == ("heldout", 2, ("perplexity",))
    assert (more.name, len(more.episodes), more.measures) == ("more", 3, ("quality", "coherence", "factuality"))
    assert [one.suffix for one in more.episodes[:2]] == [one.suffix for one in first.episodes]
    assert first.digest != more.digest


@pytest.mark.parametrize(
    ("rows", "chosen", "error", "message"),
    [
        ([{"text": "a"}], "", DataError, "has 1 prompt"),
        (
            [{"text": "a"}] * 2,
            "measures: [facts]",
            ConfigError,
            "measured by facts, but no prompt in .* has a reference",
        ),
        ([{"text": "a"}] * 2, "measures: [mc]", ConfigError, "measured by mc, but .* has texts to continue"),
        (
            [{"text": "a", "choices": ["b", "c"], "right": 0}] * 2,
            "measures: [mc, quality]",
            ConfigError,
            "measured by quality, but .* has questions",
        ),
        ([{"text": "a"}] * 2, "format: nonsense", ConfigError, "'nonsense'; allowed: heldout, jsonl, "),
        ([{"text": ""}] * 2, "", DataError, "."),
    ],
)
def test_sets_that_cannot_be_used(tmp_path, rows, chosen, error, message):
    path = records(tmp_path / "p.jsonl", *rows)
    settings = config(tmp_path, f"evaluation.sets=[{{name: mine, path: {path}, {chosen}}}]")
    with pytest.raises(error, match=message):
        load_sets(settings, ByteTokenizer())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.sets=[{name: a b, path: p}]"], r"sets\[0\].name is 'a b'"),
        (["evaluation.sets=[{name: a, path: p}, {name: a, path: q}]"], r"sets\[1\].name is a, the name of evaluation"),
        (["evaluation.sets=[{name: all, path: p}]"], "the name of the mean over all sets"),
        (["evaluation.sets=[{name: a, path: p, measures: [fun]}]"], r"sets\[0\].measures has 'fun'; allowed: quality"),
        (["evaluation.measures=[fun]"], "evaluation.measures has 'fun'"),
        (["evaluation.sets=[{name: a, path: p, format: heldout, labels: [b]}]"], r"sets\[0\].labels is \['b'\]"),
        (
            ["evaluation.sets=[{name: piqa, path: p}]", "evaluation.tasks=[standard]"],
            "the name of a task of evaluation",
        ),
        (["evaluation.tasks=[a b]"], "evaluation.tasks has 'a b'"),
        (["evaluation.sets=[{name: heldout, path: p}]", "data.heldout=[{path: h}]"], "the set of data.heldout"),
    ],
)
def test_settings_that_contradict(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *overrides)


def test_models_are_named_by_the_user_or_their_folder(tiny_model, tmp_path):
    (tmp_path / "runs/good").mkdir(parents=True)
    (tmp_path / "runs/good/export").symlink_to(tiny_model)
    (tmp_path / "a=b").symlink_to(tiny_model)
    settings = config(tmp_path, f"model.path={tiny_model}")
    found = find_models(
        settings, [f"mine={tiny_model}", f"{tmp_path}/runs/good/export", f"{tmp_path}/a=b"], "", tmp_path
    )
    assert [one.name for one in found] == ["start", "mine", "good", "a=b"]
    assert [one.reference for one in found] == [True, False, False, False]
    assert len({one.digest for one in found}) == 1
    assert {one.kind for one in found} == {"hf"}
    assert found[1].path == tiny_model
