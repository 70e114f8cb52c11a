"""rlpt teacher data with a model behind a server, which spoils suffixes and votes on what is safe: each asked once."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from hostile_server import Exchange, chat, refuses, says, serving
from tiny_model import WORDS

from megatron_rlpt.config import AnswerForm, Config, EndpointConfig, Role, load_config
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.teacher.spoiler import WAYS
from megatron_rlpt.teacher_training.build import build_teacher_data
from megatron_rlpt.teacher_training.request import DataRequest
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer

PASSAGE = re.compile(r"\[begin (?:passage|text) (\S+)\]\n(.*?)\n\[end (?:passage|text) \1\]", re.DOTALL)
ANCHOR = 5
SAFE, UNSAFE = (json.dumps({"reasoning": "So it is.", "verdict": word}) for word in ("safe", "unsafe"))


def passage(exchange: Exchange) -> str:
    (user, *_) = [one["content"] for one in exchange.body["messages"] if one["role"] == "user"]
    return PASSAGE.findall(user)[-1][1]


async def backwards(exchange: Exchange) -> bool | None:
    """Spoil a passage: after the anchor its words in the reverse order, without the last two."""
    words = passage(exchange).split()
    return await says(chat(" ".join([*words[:ANCHOR], *list(reversed(words[ANCHOR:]))[:-2]])))(exchange)


@pytest.fixture
def corpus(tmp_path):
    draw, path = random.Random(2), tmp_path / "teacher.jsonl"
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(tmp_path, tiny_model) -> Config:
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "the cat"}) + "\n")
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tiny_model)},
        "data": {"sources": [{"path": str(tmp_path / "own.jsonl")}], "suffix_length": 16, "min_prefix": 8,
                 "max_prefix": 16},
        "train": {"steps": 1},
        "teacher": {"rewriter": {"anchor_words": ANCHOR}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return load_config(tmp_path / "run.yaml")


def at(config: Config, server) -> Config:
    workers = replace(config.teacher.workers, endpoints=[EndpointConfig(url=server.url)])
    return replace(config, teacher=replace(config.teacher, workers=workers))


def request(folder, corpus, **changes) -> DataRequest:
    sizes = {"pairs": 24, "heldout_pairs": 12, "heldout_share": 0.4, "kinds": ("asked", "looped"), "lengths": (16,)}
    return DataRequest(folder, (str(corpus),), **sizes | changes)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_teacher_spoils_suffixes_once(config, corpus, tmp_path):
    out = tmp_path / "data"
    with serving(backwards) as server:
        config = at(config, server)
        build_teacher_data(config, request(out, corpus))
        asked = [one.body["messages"][0]["content"] for one in server.requests]
    assert len(asked) == 12 + 6, "half of the pairs"
    # Drawn by document, whose names hold the folder: 18 of them may miss one or two of the five.
    assert len({way for way in WAYS for text in asked if way in text}) > 2
    text = PolicyTokenizer(config.model.path)
    spoiled = [row for row in rows(out / "heldout_pairs.jsonl") if row["kind"] == "asked"]
    assert len(spoiled) == 6
    for row in spoiled:
        assert row["bad"] != row["good"]
        # As long as each other, so that the length does not tell.
        assert 8 <= len(text.encode(row["bad"])) == len(text.encode(row["good"])) < 16
    kinds = Counter(row["label"]["kind"] for row in rows(out / "train.jsonl"))
    assert kinds["asked"] == kinds["looped"] == 24, "both orders"
    card = json.loads((out / "card.json").read_text())["teacher"]
    assert card["counts"] == {"spoiled, train": {"used": 12}, "spoiled, heldout": {"used": 6}}
    assert card["prompts"]["spoiled"] == "spoil-1"
    before = (out / "train.jsonl").read_bytes()
    out.rename(tmp_path / "earlier")
    build_teacher_data(config, request(out, corpus))  # without the server
    assert (out / "train.jsonl").read_bytes() == before
    out.rename(tmp_path / "again")
    with serving(backwards, port=server.port) as server:
        build_teacher_data(config, request(out, corpus, pairs=32))
        assert len(server.requests) == 4, "those that more pairs need"


def test_what_fails_is_asked_again_and_nothing_else(config, corpus, tmp_path):
    with serving(*[backwards] * 5, refuses(400)) as server:
        with pytest.raises(TeacherError, match=r"7 of 12 requests failed, most often \(7\) with: .*the same command"):
            build_teacher_data(at(config, server), request(tmp_path / "data", corpus))
        server.script = [backwards]
        server.requests.clear()
        build_teacher_data(at(config, server), request(tmp_path / "data", corpus))
        assert len(server.requests) == 7 + 6
    assert (tmp_path / "data/card.json").is_file()


def test_a_suffix_that_is_copied_or_cut_short_is_no_pair(config, corpus, tmp_path):
    async def lazy(exchange: Exchange) -> bool | None:
        words = passage(exchange).split()
        short = exchange.body["seed"] % 2
        return await says(chat(" ".join(words[: ANCHOR + 2] if short else words)))(exchange)

    with serving(lazy) as server:
        build_teacher_data(at(config, server), request(tmp_path / "data", corpus))
    counts = json.loads((tmp_path / "data/card.json").read_text())["teacher"]["counts"]["spoiled, train"]
    assert set(counts) == {"nothing is spoiled"}, "the beginning of the suffix is a copy too"
    assert {row["label"]["kind"] for row in rows(tmp_path / "data/train.jsonl")} == {"looped"}


def test_only_texts_on_which_all_votes_agree_are_kept(config, corpus, tmp_path):
    async def by_word(exchange: Exchange) -> bool | None:
        """Call texts with one word unsafe, and disagree with itself on those with another."""
        words = passage(exchange).split()
        doubtful = WORDS[1] in words and exchange.body["seed"] % 2
        return await says(chat(UNSAFE if WORDS[0] in words or doubtful else SAFE))(exchange)

    asked = request(tmp_path / "data", corpus, axes=("safety",), kinds=(), lengths=(), safety_votes=4, pairs=40)
    with serving(by_word) as server:
        config = at(config, server)
        build_teacher_data(config, asked)
        assert len(server.requests) == 4 * (40 + 12)
    card = json.loads((tmp_path / "data/card.json").read_text())["teacher"]["counts"]
    assert card["safety votes, train"]["unanimous"] + card["safety votes, train"]["split"] == 40
    assert card["safety votes, train"]["split"] > 0
    texts = rows(tmp_path / "data/heldout_texts.jsonl")
    assert Counter(one["verdict"] for one in texts).keys() == {"safe", "unsafe"}
    for one in texts:
        words = one["text"].split()
        assert (WORDS[0] in words) is (one["verdict"] == "unsafe")
        assert WORDS[0] in words or WORDS[1] not in words or one["verdict"] == "safe"
    train = rows(tmp_path / "data/train.jsonl")
    assert {row["label"]["axis"] for row in train} == {"safety"}
    verdicts = Counter(row["label"]["verdict"] for row in train)
    assert verdicts["safe"] == verdicts["unsafe"] > 0
    assert not (tmp_path / "data/heldout_pairs.jsonl").exists()
    (tmp_path / "data").rename(tmp_path / "earlier")
    build_teacher_data(config, asked)  # without the server


def test_a_rewriter_copies_what_is_voted_safe_and_improves_the_rest(config, corpus, tmp_path):
    async def by_word(exchange: Exchange) -> bool | None:
        return await says(chat(UNSAFE if WORDS[0] in passage(exchange).split() else SAFE))(exchange)

    asked = request(tmp_path / "data", corpus, role=Role.rewriter, kinds=(), safety_votes=2, pairs=40)
    with serving(by_word) as server:
        build_teacher_data(at(config, server), asked)
    assert not (tmp_path / "data/heldout_texts.jsonl").exists()
    for part in ("train", "heldout"):
        found = rows(tmp_path / f"data/{part}.jsonl")
        assert Counter(row["label"]["good"] for row in found)[True] * 2 == len(found) > 4
        for row in found:
            label = row["label"]
            assert label["kind"] == ("good" if label["good"] else "unsafe")
            assert (WORDS[0] in label["suffix"].split()) is not label["good"]
            if label["good"]:
                assert row["answer_start"] + row["answer"] == f"{label['anchor']}{label['suffix']}"
            else:
                assert "answer" not in row, "no better text is known"


@pytest.mark.parametrize(
    ("generative", "problem"),
    [
        ({"temperature": 0.0}, "--safety-votes is 2 and teacher.generative.temperature 0, so all votes are the same"),
        ({"answer": AnswerForm.direct}, "--safety-votes is 2, but teacher.generative.answer=direct has one vote"),
    ],
)
def test_votes_that_cannot_differ_are_refused_before_any_is_asked_for(config, corpus, tmp_path, generative, problem):
    asked = request(tmp_path / "data", corpus, axes=("safety",), kinds=(), lengths=(), safety_votes=2, pairs=40)
    teacher = replace(config.teacher, generative=replace(config.teacher.generative, **generative))
    with serving(says(chat(SAFE))) as server:
        with pytest.raises(ConfigError, match=re.escape(problem)):
            build_teacher_data(at(replace(config, teacher=teacher), server), asked)
        assert not server.requests


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"role": Role.rewriter, "safety_votes": 3}, "--kind is asked looped; allowed: without --safety-votes"),
        ({"kinds": ("asked",)}, "teacher.workers.endpoints is empty; name the servers"),
        ({"axes": ("safety",)}, "without a --world, which knows the verdicts, safety with --safety-votes"),
        ({"safety_votes": 3}, "--safety-votes is 3; allowed: with --axis safety or --role rewriter"),
        ({"axes": ("safety",), "safety_votes": 3, "kinds": ("asked",)}, "--kind is asked, which is of pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(config, corpus, tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        build_teacher_data(config, request(tmp_path / "data", corpus, **changes))
