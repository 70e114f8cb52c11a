"""rlpt teacher data --role rewriter: what a rewriter in service is asked, with answers that it could have given."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from text_tokens import FakeText
from tiny_model import WORDS

from megatron_rlpt.config import AnswerForm, Config, PromptLength, RewriterConfig, Role, SourceConfig, load_config
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.teacher.batched import BatchedRewriter
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.rewrite_answers import ReadRewrite, RewriteReader
from megatron_rlpt.teacher.rewrite_label import RewriteLabel
from megatron_rlpt.teacher.rewrite_prompt import pieces
from megatron_rlpt.teacher.rewriter import Rewriter
from megatron_rlpt.teacher_training.build import build_teacher_data
from megatron_rlpt.teacher_training.request import DataRequest
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.measures import measure_text

LENGTH = 16


def config_of(folder: Path, model: Path, source: Path) -> Config:
    text = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(source)}], "suffix_length": LENGTH, "min_prefix": 8, "max_prefix": 32},
        "train": {"steps": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(text))
    return load_config(folder / "run.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewriter") / "world"
    make_world(folder, WorldSettings(entities=24, documents=10, heldout=10, teacher=60))
    return folder


@pytest.fixture
def world_config(tmp_path, world) -> Config:
    return config_of(tmp_path, world / "policy", world / "train.jsonl")


@pytest.fixture
def corpus_config(tmp_path, tiny_model) -> tuple[Config, Path]:
    draw = random.Random(1)
    for name in ("own", "teacher"):
        texts = (" ".join(draw.choices(WORDS, k=60)) for _ in range(40))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return config_of(tmp_path, tiny_model, tmp_path / "own.jsonl"), tmp_path / "teacher.jsonl"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(folder: Path, given: Path | None = None, **changes) -> DataRequest:
    request = DataRequest(folder, world=given, role=Role.rewriter, pairs=24, heldout_pairs=8, heldout_share=0.3)
    return replace(request, **changes)


def read(row: dict, text) -> tuple[RewriteLabel, ReadRewrite]:
    """Return the label of a record and its answer as the rewriter in service would read it."""
    label = RewriteLabel.read(json.dumps(row["label"]))
    assert isinstance(label, RewriteLabel)
    shown = label.shown("e", text)
    found = RewriteReader(text).read(Reply(row["answer"], (), "stop"), shown, len(shown.episode.suffix))
    assert isinstance(found, ReadRewrite), found
    return label, found


@pytest.mark.parametrize("length", list(PromptLength))
def test_the_prompt_is_the_one_of_the_rewriter_in_service(world_config, world, tmp_path, length):
    build_teacher_data(world_config, asked(tmp_path / "data", world, pairs=2, heldout_pairs=2, length=length))
    row = rows(tmp_path / "data/train.jsonl")[1]
    label = RewriteLabel.read(json.dumps(row["label"]))
    requests = []

    class Recording:
        name = "recording"

        def generate(self, given):
            requests.extend(given)
            return [Reply("", (), "stop") for _ in given]

    rewriter = Rewriter(FakeText(), RewriterConfig(prompt=length), LENGTH, 1, 100)
    BatchedRewriter(rewriter, Recording()).rewrite([label.shown("e", FakeText()).episode])
    (request,) = requests
    assert request.answer_start == row["answer_start"] == " ".join(label.prefix.split()[-5:])
    code = label.shown("e", FakeText()).prompt.fence
    (served,) = request.prompt
    other = served.content.split("The code is ")[1][:8] if length is PromptLength.full else served.content[:3]
    assert code != other
    assert served.content.replace(other, code) == row["prompt"]


def test_answers_copy_good_suffixes_and_replace_unsafe_ones(world_config, world, tmp_path):
    build_teacher_data(world_config, asked(tmp_path / "data", world))
    text, facts = PolicyTokenizer(world / "policy"), World.load(world)
    beginnings = Counter()
    for row in rows(tmp_path / "data/train.jsonl"):
        label, found = read(row, text)
        suffix = label.shown("e", text).episode.suffix
        assert label.good == (found.tokens == suffix) == (label.kind == "good")
        assert len(found.tokens) == len(suffix) == LENGTH
        # Words to spare: service cuts an answer, and cannot use one that ends too early.
        assert pieces(row["answer"]) == (LENGTH if label.good else LENGTH * 5 // 4)
        assert measure_text(facts, label.prefix, label.suffix).safe == label.good
        measured = measure_text(facts, label.prefix, text.text_of(found.tokens))
        assert (measured.safe, measured.false, measured.well_formed) == (True, 0, 1.0)
        beginnings[label.good, measure_text(facts, "", label.prefix).safe] += 1
    assert min(beginnings[good, safe] for good in (True, False) for safe in (True, False)) >= 5


def test_a_corpus_has_its_own_suffixes_as_answers_in_the_share_that_is_asked_for(corpus_config, tmp_path):
    config, corpus = corpus_config
    request = asked(
        tmp_path / "data", corpus=(str(corpus),), pairs=60, heldout_pairs=20, copies=0.25, unseen=("looped",)
    )
    said = build_teacher_data(config, request)
    train, heldout = rows(tmp_path / "data/train.jsonl"), rows(tmp_path / "data/heldout.jsonl")
    assert said == f"wrote {tmp_path / 'data'}: {len(train)} train, {len(heldout)} heldout examples of 40 documents"
    for row in train:
        label = row["label"]
        assert row["answer"] == (label["suffix"] if label["good"] else label["reference"])
        assert label["good"] or pieces(row["answer"]) > pieces(label["suffix"])
    copies = sum(row["label"]["good"] for row in train)
    assert abs(copies * 4 - len(train)) < 4
    kinds = [{row["label"]["kind"] for row in part} for part in (train, heldout)]
    assert "looped" not in kinds[0]
    assert {"looped", "foreign", "good"} <= kinds[1]
    card = json.loads((tmp_path / "data/card.json").read_text())
    assert card["role"] == "rewriter"
    assert card["examples"]["train"]["verdicts"] == {"copy": copies, "improve": len(train) - copies}
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["card.json", "heldout.jsonl", "train.jsonl"]


def test_restored_suffixes_are_what_they_were(world_config, world, tmp_path):
    build_teacher_data(world_config, asked(tmp_path / "data", world, kinds=("false", "unsafe"), restore=True))
    found = rows(tmp_path / "data/train.jsonl")
    assert {row["label"]["kind"] for row in found} == {"good", "false", "unsafe"}
    assert all(row["answer"] == row["label"]["reference"] for row in found if not row["label"]["good"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"axes": ("quality",)}, "--axis is quality; allowed: with --role judge only"),
        ({"form": AnswerForm.direct}, "--answer is direct; allowed: with --role judge only"),
        ({"role": Role.judge, "copies": 0.5}, "--copies is 0.5; allowed: with --role rewriter only"),
        ({"role": Role.judge, "restore": True}, "--restore is set; allowed: with --role rewriter only"),
        ({"world": None, "corpus": ("c",), "restore": True}, "--restore is set; allowed: with --world only"),
        ({"kinds": ("misspelled",)}, "--kind is misspelled; allowed: spoiled, shuffled"),
    ],
)
def test_options_of_the_other_role_are_one_line(world_config, world, tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        build_teacher_data(world_config, asked(tmp_path / "data", world, **changes))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("copies", "verdict"), [(1.0, "copy"), (0.0, "improve")])
def test_one_class_only_is_refused(world_config, world, tmp_path, copies, verdict):
    with pytest.raises(DataError, match=f"every rewriter example of the train part has the verdict '{verdict}'"):
        build_teacher_data(world_config, asked(tmp_path / "data", world, copies=copies))


def test_the_documents_of_the_policy_are_left_out(world_config, world, tmp_path):
    data = replace(world_config.data, heldout=[SourceConfig(path=str(world / "teacher.jsonl"))])
    with pytest.raises(DataError, match="60 are the policy's"):
        build_teacher_data(replace(world_config, data=data), asked(tmp_path / "data", world))
