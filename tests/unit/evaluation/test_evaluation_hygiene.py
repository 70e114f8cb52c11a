"""Prompts of an evaluation that are in training text, or in each other."""

from __future__ import annotations

import json
import random

import pytest
from text_tokens import FakeTokenizer

from megatron_rlpt.config import Config, HeldOutOverlap, SourceConfig, flatten
from megatron_rlpt.data import HeldOut
from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation import hygiene
from megatron_rlpt.evaluation.hygiene import check_hygiene, training_sources, without_known
from megatron_rlpt.evaluation.hygiene_text import hygiene_notes, hygiene_rows
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.evaluation.prompts import Question
from megatron_rlpt.types import Episode

TEXT = FakeTokenizer(0x110000, lambda tokens: "".join(map(chr, tokens)), lambda text: list(map(ord, text)))


def prompts(name, texts):
    """Return a set of prompts; the last word of each is what follows."""
    episodes = []
    for number, text in enumerate(texts):
        prefix, space, last = text.rpartition(" ")
        episodes.append(
            Episode(
                f"{name}{number}", tuple(map(ord, prefix)), tuple(map(ord, space + last)), "c", f"{name}-{number}", 1
            )
        )
    return PromptSet(name, "jsonl", "p", (), 1.0, tuple(episodes), ("",) * len(episodes))


def words(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=5)) for _ in range(count)]


@pytest.fixture
def corpus(tmp_path):
    """Return a function that writes training documents and returns the configuration of a run on them."""

    def write(*documents, **settings):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        config = Config()
        config.run.dir, config.model.path = str(tmp_path), "m"
        config.data.sources = [SourceConfig(path=str(path))]
        for name, value in settings.items():
            setattr(config.evaluation, name, value)
        return config

    return write


def test_what_training_has_of_the_prompts(corpus):
    copied, quoted, new = (words(40, seed) for seed in range(3))
    fresh = words(60, 9)
    changed = [*copied[:20], "other", *copied[21:]]
    sets = [
        prompts("a", [" ".join(copied), " ".join(quoted), " ".join(new)]),
        prompts("b", [" ".join(new[:12]), " ".join(fresh[:30])]),
    ]
    near = " ".join([*fresh[30:40], *changed, *fresh[40:]])
    config = corpus(near.upper().replace(" ", ", "), " ".join([*quoted[:16], *fresh[30:]]))
    found = check_hygiene(config, sets, TEXT, {})
    (source,) = found["sources"]
    assert (source["documents"], source["complete"], source["problem"]) == (2, True, "")
    first, second = found["sets"]["a"], found["sets"]["b"]
    assert (first["prompts"], first["too_short"], first["overlapping"]) == (3, 0, 2)
    # Of 28 13-grams a changed word takes 13, and 16 words in a row have 4.
    assert first["overlap"] == pytest.approx((15 / 28 + 4 / 28 + 0) / 3)
    assert (first["near_training"], first["near_prompts"]) == (1, 0)
    assert first["examples"][0]["prompt"] == "a-0"
    assert first["examples"][0]["share"] == pytest.approx(31 / 36)
    assert (
        first["examples"][0]["in"].endswith("train.jsonl (train.jsonl:0)")
        or "train.jsonl" in first["examples"][0]["in"]
    )
    assert (second["prompts"], second["too_short"], second["overlapping"], second["near_training"]) == (2, 1, 0, 0)
    assert second["near_prompts"] == 1, "its twelve words are in a prompt of the other set"
    assert hygiene_rows(found) == [
        ("training text", "2 documents (0.0 MiB, all of 1 source)"),
        (
            "a",
            "3 prompts; 2 of 3 share 13 words in a row with training text; near-duplicates: 0 of another prompt, "
            "1 of training text",
        ),
        (
            "b",
            "2 prompts; 0 of 1 share 13 words in a row with training text; near-duplicates: 1 of another prompt, "
            "0 of training text",
        ),
    ]
    assert hygiene_notes(found) == [
        "of the 3 prompts of a, 1 are near-duplicates of training text and 2 share 13 words in a row with it: a model "
        "may know them"
    ]


def test_short_prompts_that_are_equal_are_duplicates(corpus):
    asked = [Question("q", "Who is it?", (" a", " b"), (True, False))]
    found = check_hygiene(
        corpus("nothing"),
        [PromptSet("q", "jsonl", "p", (), questions=tuple(asked * 2)), prompts("p", ["who IS it?"])],
        TEXT,
        {},
    )
    assert [one["near_prompts"] for one in found["sets"].values()] == [2, 1]


def test_the_limit_is_kept_and_told(corpus, tmp_path):
    late = " ".join(words(40, 3))
    config = corpus(*(" ".join(words(2000, seed)) for seed in range(10, 20)), late, overlap_limit=20_000 / 2**30)
    sets = [prompts("a", [late, "b c"])]
    found = check_hygiene(config, sets, TEXT, {})
    (source,) = found["sources"]
    assert (source["documents"], source["complete"]) == (2, False)
    assert found["sets"]["a"]["overlapping"] == 0
    assert "the beginning of 1 source" in hygiene_rows(found)[0][1]
    config.evaluation.overlap_limit = 1.0
    assert check_hygiene(config, sets, TEXT, {})["sets"]["a"]["overlapping"] == 1
    config.evaluation.overlap_limit = 0.0
    assert hygiene_rows(check_hygiene(config, sets, TEXT, {}))[0] == ("training text", "not compared")


def test_training_text_of_the_models_counts_too(corpus, tmp_path):
    text = " ".join(words(40, 5))
    config = corpus("nothing")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"body": text}) + "\n")
    run = Config()
    run.data.sources = [SourceConfig(path=str(other), field="body"), config.data.sources[0]]
    run.data.sources.append(SourceConfig(path=str(tmp_path / "gone.jsonl")))
    models = {"sip": flatten(run), "base": None}
    assert [one.path for one in training_sources(config, models)] == [
        config.data.sources[0].path, str(other), str(tmp_path / "gone.jsonl"),
    ]  # fmt: skip
    found = check_hygiene(config, [prompts("a", [text, "b c"])], TEXT, models)
    assert found["sets"]["a"]["near_training"] == 1
    rows = hygiene_rows(found)
    assert rows[0][1].startswith("2 documents (")
    assert rows[1][0] == f"training text {tmp_path}/gone.jsonl"
    assert rows[1][1].startswith("not compared: ")


def test_documents_that_training_left_out_do_not_count(corpus, tmp_path):
    """With ``data.heldout_overlap=skip`` a held-out document in the corpus is no part of the training text."""
    held, free = (" ".join(words(60, seed)) for seed in (7, 8))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": held}) + "\n")
    config = corpus(held, free)
    left_out = HeldOut({"data.heldout": [SourceConfig(path=str(tmp_path / "held.jsonl"))]})
    sets = [prompts("a", [held, free])]

    def near(known):
        found = check_hygiene(config, sets, TEXT, {}, tmp_path / "cache", known)
        return found["sets"]["a"]["near_training"], found["sources"][0]["left_out"], hygiene_rows(found)[0][1]

    assert near(left_out)[:2] == (2, 0), "a run that refuses has no such document"
    config.data.heldout_overlap = HeldOutOverlap.skip
    assert near(None)[:2] == (2, 0), "nothing is on record"
    assert near(left_out)[:2] == (1, 1)
    assert near(left_out)[2].endswith("; 1 more were left out of training because they are held out")


def test_the_result_is_kept_until_something_changes(corpus, tmp_path, monkeypatch):
    text = " ".join(words(40, 6))
    sets, cache = [prompts("a", [text, "b c"])], tmp_path / "cache"
    config = corpus("nothing")
    first = check_hygiene(config, sets, TEXT, {}, cache)
    opened = []
    real = hygiene.open_source
    monkeypatch.setattr(hygiene, "open_source", lambda *given: opened.append(given) or real(*given))
    assert check_hygiene(config, sets, TEXT, {}, cache) == first
    assert opened == []
    config = corpus("nothing", text)
    assert check_hygiene(config, sets, TEXT, {}, cache)["sets"]["a"]["near_training"] == 1
    assert check_hygiene(config, [prompts("b", ["c d"])], TEXT, {}, cache)["sets"].keys() == {"b"}
    assert len(opened) == 2


def test_prompts_that_training_knows_can_be_left_out(corpus):
    known, new, other = (" ".join(words(40, seed)) for seed in range(3))
    sets = [prompts("a", [new, known, other]), prompts("b", [known, new])]
    asked = tuple(Question(str(n), text, (" a", " b"), (True, False)) for n, text in enumerate((known, new, other)))
    sets.append(PromptSet("q", "jsonl", "p", (), questions=asked))
    found = check_hygiene(corpus(known), sets, TEXT, {})
    assert [one["known"] for one in found["sets"].values()] == [[1], [0], [0]]
    with pytest.raises(DataError, match="1 of 2 prompts of the set b are near-duplicates of training text and fewer"):
        without_known(sets, found)
    first, questions = without_known([sets[0], sets[2]], found)
    assert (first.episodes, first.labels) == (sets[0].episodes[::2], ("", ""))
    assert questions.questions == asked[1:]
    assert hygiene_notes(found)[0] == "1 of 3 prompts of a were left out: near-duplicates of training text"
    assert hygiene_notes(found)[1].endswith("a model may know them"), "of b nothing was left out"
