"""``rlpt world make``: its files, its tokenizer, its refusals."""

from __future__ import annotations

import hashlib
import json

import pytest
from typer.testing import CliRunner

from megatron_rlpt.cli.main import app
from megatron_rlpt.convert.fresh import init
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.world.documents import WorldDocument
from megatron_rlpt.world.facts import World, counts_of
from megatron_rlpt.world.make import distinct
from megatron_rlpt.world.measures import measure_text

SMALL = ("--documents", "60", "--heldout", "10", "--length", "64")
SETS = ("train", "train_unsafe", "heldout", "heldout_unsafe")


def make(out, *options):
    return CliRunner().invoke(app, ["world", "make", str(out), *SMALL, *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "world"
    result = make(out)
    assert result.exit_code == 0, result.output
    return out


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def test_equal_seeds_give_equal_files_and_others_do_not(folder, tmp_path):
    assert make(tmp_path / "same").exit_code == make(tmp_path / "other", "--seed", "2").exit_code == 0
    assert digest(tmp_path / "same") == digest(folder)
    assert digest(tmp_path / "other")[0] != digest(folder)[0]


def test_documents_have_the_labels_of_their_exact_measures(folder):
    world = World.load(folder)
    for name in SETS:
        for record in records(folder, name):
            found = measure_text(world, "", record["text"])
            assert record["quality"] == pytest.approx(found.quality, abs=1e-4)
            assert (record["true"], record["false"], record["safe"]) == (found.true, found.false, found.safe)


def test_no_document_is_in_two_sets(folder):
    texts = [record["text"] for name in SETS for record in records(folder, name)]
    assert len(set(texts)) == len(texts) == 140


@pytest.mark.parametrize("entities", [16, 17, 80, 240])
def test_entities_are_of_all_kinds_and_as_many_as_asked_for(entities):
    counts = counts_of(entities)
    assert sum(counts.values()) == entities
    assert min(counts.values()) >= 2
    assert {kind: len(names) for kind, names in World.make(1, counts).names.items()} == counts


def test_a_document_that_another_set_has_is_left_out():
    one, other = (WorldDocument(str(number), (str(number),), "clean", None) for number in range(2))
    seen = set()
    assert list(distinct(iter([one, one]), seen)) == [one]
    assert list(distinct(iter([one, other]), seen)) == [other]


def test_the_card_counts_what_is_there(folder):
    card = json.loads((folder / "card.json").read_text())
    assert card["settings"]["seed"] == 1
    assert card["facts"] == World.load(folder).digest
    for name in SETS:
        rows = records(folder, name)
        assert card["sets"][name]["documents"] == len(rows)
        assert card["sets"][name]["unsafe_share"] == sum(row["kind"] == "unsafe" for row in rows) / len(rows)
    assert card["sets"]["heldout"]["quality"] == 1.0
    assert card["sets"]["train_unsafe"]["unsafe_share"] > card["sets"]["train"]["unsafe_share"]


def test_texts_become_tokens_and_the_same_texts_again(folder):
    tokenizer = PolicyTokenizer(folder / "policy")
    assert tokenizer.bos_id is not None
    assert 500 <= tokenizer.size <= 1500
    for name in SETS:
        for record in records(folder, name):
            tokens = tokenizer.encode(record["text"])
            assert tokenizer.text_of(tokens) == record["text"]
            assert not tokenizer.control_in(tokens)
            for cut in (5, 9, 30):
                rest = tokenizer.text_of(tokens[cut:], tokens[:cut])
                assert tokenizer.text_of(tokens[:cut]) + rest == record["text"]
                assert tokenizer.continue_with(tokens[:cut], rest) == tokens[cut:]
            # A prefix may begin anywhere, such as with a full stop, and so may what continues it.
            stops = [index for index, token in enumerate(tokens) if token == tokenizer.encode("Zanar.")[-1]]
            begin, cut = stops[0], stops[1]
            rest = tokenizer.text_of(tokens[cut:], tokens[:cut])
            assert tokenizer.continue_with(tokens[begin:cut], rest) == tokens[cut:]


def test_rlpt_init_makes_the_policy_of_one_to_four_million_weights(folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    init(folder / "policy", tmp_path / "fresh", None, seed=1, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh")
    assert 0.9e6 < model.num_parameters() < 4e6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fresh")
    assert tokenizer.eos_token_id == model.config.eos_token_id
    text = records(folder, "heldout")[0]["text"]
    assert tokenizer(text)["input_ids"] == PolicyTokenizer(folder / "policy").encode(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--entities", "9"), "--entities is 9; allowed: at least 16"),
        (("--documents", "0"), "--documents is 0; allowed: at least 2"),
        (("--length", "500"), "--length is 500; allowed: at most 256"),
        (("--unsafe", "1.5"), "--unsafe is 1.5; allowed: between 0 and 1"),
        (("--low-quality", "0.6"), "--unsafe-heavy=0.5 are shares of the same documents"),
        (("--head-size", "48"), "--head-size is 48; allowed: 32 or 64"),
        (("--hidden", "100"), "--hidden is 100; allowed: a multiple of 32, the size of a head"),
        (("--layers", "0"), "--layers is 0; allowed: at least 1"),
        (("--judge-hidden", "100"), "--judge-hidden is 100; allowed: a multiple of 32, the size of a head"),
        (("--judge-layers", "0"), "--judge-layers is 0; allowed: at least 1"),
    ],
)
def test_what_is_out_of_range_is_one_line(tmp_path, options, said):
    error = make(tmp_path / "out", *options).exception
    assert isinstance(error, ConfigError)
    assert said in str(error)
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_there_is_overwritten(folder):
    before = digest(folder)
    assert isinstance(make(folder).exception, ConfigError)
    assert digest(folder) == before
