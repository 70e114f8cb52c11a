"""rlpt teacher data: labelled prompts of documents that the policy never sees, in parts that share no document."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_model import WORDS

from megatron_rlpt.config import AnswerForm, Config, PromptSetConfig, Role, SourceConfig, load_config
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.teacher.right_verdict import verdict_of
from megatron_rlpt.teacher_training.build import build_teacher_data
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt, require_usable
from megatron_rlpt.teacher_training.request import DataRequest, kinds_of
from megatron_rlpt.world.claims import claims_of, is_true
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import words_of
from megatron_rlpt.world.make import WorldSettings, make_world


def documents(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=60))}) + "\n" for _ in range(count)))
    return path


@pytest.fixture
def config(tmp_path, tiny_model) -> Config:
    own = documents(tmp_path / "own.jsonl", 10, 1)
    text = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tiny_model)},
        "data": {"sources": [{"path": str(own)}], "suffix_length": 16, "min_prefix": 8, "max_prefix": 16},
        "train": {"steps": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(text))
    return load_config(tmp_path / "run.yaml")


def request(folder: Path, given: Path, **changes) -> DataRequest:
    asked = DataRequest(folder, (str(given),), pairs=60, heldout_pairs=40, heldout_share=0.3, unseen=("transposed",))
    return replace(asked, **changes)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_in_both_orders_in_parts_that_share_no_document(config, tmp_path):
    corpus = documents(tmp_path / "teacher.jsonl", 60, 2)
    out = tmp_path / "data"
    said = build_teacher_data(config, request(out, corpus))
    train, heldout = rows(out / "train.jsonl"), rows(out / "heldout.jsonl")
    assert said == f"wrote {out}: {len(train)} train, {len(heldout)} heldout examples of 60 documents"
    assert len(train) > len(heldout) > 50
    for part in (train, heldout):
        assert Counter(row["label"]["verdict"] for row in part).keys() == {"1", "2"}
        verdicts = [sorted(row["label"]["verdict"] for row in part if row["label"]["pair"] == pair)
                    for pair in {row["label"]["pair"] for row in part}]  # fmt: skip
        assert all(found == ["1", "2"] for found in verdicts)
        for row in part:
            assert verdict_of(row["answer"], "quality", "reasoned") == row["label"]["verdict"]
    assert "transposed" not in {row["label"]["kind"] for row in train}
    assert "transposed" in {row["label"]["kind"] for row in heldout}
    texts = [one["text"] for one in rows(corpus)]

    def used(part):
        return {text for text in texts for row in part if " ".join(text.split()[20:24]) in row["prompt"]}

    assert not used(train) & used(heldout)
    card = json.loads((out / "card.json").read_text())
    assert card["examples"]["train"]["total"] == len(train)
    assert card["documents"]["train"] + card["documents"]["heldout"] == 60
    assert 2 * len(rows(out / "heldout_pairs.jsonl")) == len(heldout)


def test_a_kind_that_counts_twice_gets_twice_as_many_pairs(config, tmp_path):
    corpus = documents(tmp_path / "teacher.jsonl", 60, 2)
    build_teacher_data(config, request(tmp_path / "data", corpus, kinds=kinds_of(["looped", "foreign=2"])))
    counts = Counter(row["label"]["kind"] for row in rows(tmp_path / "data/train.jsonl"))
    assert counts["foreign"] == 2 * counts["looped"] > 20


@pytest.mark.parametrize("given", ["foreign=0", "foreign=", "foreign=many", "foreign=-1", "foreign=1.5"])
def test_a_kind_counts_a_whole_number_of_times(given):
    with pytest.raises(ConfigError, match=f"--kind is {given}; write foreign=N, with a whole number from 1 as N"):
        kinds_of([given])
    assert kinds_of(["looped", "foreign", "foreign"]) == kinds_of(["looped", "foreign=2"])


def test_equal_requests_give_equal_files_and_another_seed_others(config, tmp_path):
    corpus = documents(tmp_path / "teacher.jsonl", 40, 2)
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_teacher_data(config, request(tmp_path / name, corpus, seed=seed))
        texts.append((tmp_path / name / "train.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_documents_of_the_policy_are_left_out(config, tmp_path):
    own, other = config.data.sources[0].path, documents(tmp_path / "teacher.jsonl", 40, 2)
    both = tmp_path / "both.jsonl"
    both.write_text(Path(own).read_text() + other.read_text())
    build_teacher_data(config, request(tmp_path / "data", both))
    card = json.loads((tmp_path / "data/card.json").read_text())
    assert card["documents"]["left_out"] == 10
    with pytest.raises(DataError, match=r"has 0 of 0 usable documents \(10 are the policy's"):
        build_teacher_data(config, request(tmp_path / "none", Path(own)))
    held = replace(config, data=replace(config.data, sources=[], heldout=[SourceConfig(path=str(other))]))
    with pytest.raises(DataError, match="40 are the policy's"):
        build_teacher_data(held, request(tmp_path / "none", other))
    sets = [PromptSetConfig(name="other", path=str(other), format="heldout")]
    measured = replace(config, evaluation=replace(config.evaluation, sets=sets))
    with pytest.raises(DataError, match="40 are the policy's"):
        build_teacher_data(measured, request(tmp_path / "none", other))


def test_direct_answers_are_one_word(config, tmp_path):
    corpus = documents(tmp_path / "teacher.jsonl", 30, 2)
    build_teacher_data(config, request(tmp_path / "data", corpus, form=AnswerForm.direct))
    assert {row["answer"] for row in rows(tmp_path / "data/train.jsonl")} == {"1", "2"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"corpus": ()}, "neither --corpus nor --world is given"),
        ({"axes": ("taste",)}, "--axis is taste; allowed: quality, safety"),
        ({"axes": ("safety",)}, "allowed: quality without a --world"),
        ({"kinds": ("burnt",)}, "--kind is burnt; allowed: shuffled, spoiled"),
        ({"kinds": ("sampled",), "role": Role.rewriter}, "--kind is sampled; allowed: with --role judge only"),
        ({"kinds": ("looped",), "unseen": ("looped",)}, "looped is both a --kind and --unseen"),
        ({"unseen": ("shuffled", "spoiled", "looped", "foreign", "clipped", "dropped", "transposed", "misspelled")},
         "every kind is --unseen; leave some to train on"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(config, tmp_path, changes, problem):
    corpus = documents(tmp_path / "teacher.jsonl", 5, 2)
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        build_teacher_data(config, request(tmp_path / "data", corpus, **changes))
    assert not (tmp_path / "data").exists()


def test_a_corpus_too_small_for_two_parts_is_refused(config, tmp_path):
    corpus = documents(tmp_path / "teacher.jsonl", 2, 2)
    with pytest.raises(DataError, match=r"part has \d of 2 usable documents .*give more documents, at least 2 for"):
        build_teacher_data(config, request(tmp_path / "data", corpus))


def example(identity: str, verdict: str) -> LabelledPrompt:
    return LabelledPrompt(identity, "p", verdict, {"axis": "quality", "verdict": verdict})


def test_labels_that_contradict_each_other_or_have_one_class_are_refused():
    with pytest.raises(DataError, match="calls the same texts both 1 and 2"):
        require_usable([example("a", "1"), example("a", "2")], "train")
    with pytest.raises(DataError, match="every quality example of the train part has the verdict '1', from which"):
        require_usable([example("a", "1"), example("b", "1")], "train")
    with pytest.raises(DataError, match="no example"):
        require_usable([], "train")


@pytest.fixture
def in_a_world(tmp_path, config) -> tuple[Path, Config]:
    """The folder of a world, and the configuration of a policy in it."""
    folder = tmp_path / "world"
    make_world(folder, WorldSettings(entities=24, documents=30, heldout=10, teacher=60))
    sources = [SourceConfig(path=str(folder / "train.jsonl"))]
    data = replace(config.data, sources=sources, suffix_length=16, max_prefix=64)
    return folder, replace(config, data=data, model=replace(config.model, path=str(folder / "policy")))


def test_reasons_about_facts_recall_what_is_true_before_they_decide(tmp_path, in_a_world):
    folder, own = in_a_world
    world, axes = World.load(folder), ("quality", "factuality")
    asked = DataRequest(tmp_path / "data", world=folder, axes=axes, pairs=90, heldout_share=0.3)
    build_teacher_data(own, asked)
    recalled: Counter[str] = Counter()
    for row in rows(tmp_path / "data/train.jsonl"):
        kind, reason = row["label"]["kind"], json.loads(row["answer"])["reasoning"]
        *truths, decides = [f"{sentence}." for sentence in reason.split(". ")]
        said = [words_of(f"{truth.rstrip('.').split(',')[0]}.") for truth in truths]
        claims = [one for words in said for one in claims_of(world, [], words)]
        assert len(claims) == len(truths)
        assert all(is_true(world, one) and not one.negated for one in claims)
        assert "false" in decides or not truths or kind == "unchecked text"
        recalled[kind] += bool(truths)
        if kind == "false":
            assert len(truths) == 1, "what the worse text denies"
    assert recalled.keys() >= {"false", "true text", "false text"}
    assert recalled["false"] > 5
    assert recalled["false text"] > 5
    assert not recalled["looped"] + recalled["negated"] + recalled["shuffled"]
    card = json.loads((tmp_path / "data/card.json").read_text())
    tasks = card["examples"]["train"]["tasks"]
    assert 10 < tasks["factuality"] <= tasks["quality"] // 4, "comparing is what takes most examples"


def test_a_world_gives_exact_corruptions_and_what_is_safe(tmp_path, in_a_world):
    folder, own = in_a_world
    asked = DataRequest(tmp_path / "data", world=folder, axes=("quality", "safety"), pairs=90, heldout_share=0.3)
    build_teacher_data(own, asked)
    world = World.load(folder)
    found = rows(tmp_path / "data/train.jsonl")
    assert {row["label"]["axis"] for row in found} == {"quality", "safety"}
    counts = Counter(row["label"]["verdict"] for row in found if row["label"]["axis"] == "safety")
    assert counts["safe"] == counts["unsafe"] > 3
    assert {"negated", "false", "swapped"} <= {row["label"]["kind"] for row in found}
    # Shuffled, because a run reads them from the beginning; the two orders of a pair stay together.
    assert {row["label"]["axis"] for row in found[: len(found) // 4]} == {"quality", "safety"}
    places = defaultdict(list)
    for index, row in enumerate(found):
        places[row["label"].get("pair")].append(index)
    del places[None]
    assert all(second == first + 1 for first, second in places.values())
    assert set(words_of(rows(folder / "teacher.jsonl")[0]["text"])) <= set(world.grammar.vocabulary)
