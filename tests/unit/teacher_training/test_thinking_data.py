"""rlpt teacher thoughts: prompts to think and go on, of documents that the policy never sees."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from text_tokens import FakeText
from tiny_model import WORDS

from megatron_rlpt.config import Config, PromptLength, load_config
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError, DataError, TeacherError
from megatron_rlpt.rollout.engine import Continuation
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.true_continuation import read_prediction
from megatron_rlpt.teacher_training import teacher_answers, thoughts
from megatron_rlpt.teacher_training.thinking_data import ThoughtsRequest, build_thoughts
from megatron_rlpt.teacher_training.thinking_examples import Piece, pieces_of, steps_of
from megatron_rlpt.teacher_training.thoughts import read_thought
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.trainer.fixed_evaluation import build_fixed_evaluation
from megatron_rlpt.types import Episode, Failed
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.measures import measure_text
from megatron_rlpt.world.thinking import plan_of


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_of(folder: Path, model: Path, own: Path, suffix_length: int = 24, **teacher) -> Config:
    text = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(own)}], "suffix_length": suffix_length, "min_prefix": 16, "max_prefix": 48},
        "train": {"steps": 1},
        "teacher": teacher,
    }
    (folder / "run.yaml").write_text(json.dumps(text))
    return load_config(folder / "run.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("thinking") / "world"
    make_world(folder, WorldSettings(entities=24, documents=4, heldout=10, teacher=60))
    return folder


def test_a_world_writes_the_thoughts_and_both_forms_have_the_same_prompts(world, tmp_path):
    config = config_of(tmp_path, world / "policy", world / "train.jsonl")
    found = {}
    for name, plain in (("thought", False), ("plain", True)):
        asked = ThoughtsRequest(tmp_path / name, world=world, plain=plain, prompts=60, length=PromptLength.brief)
        assert build_thoughts(config, asked).startswith(f"wrote {tmp_path / name}: 60 train, ")
        found[name] = rows(tmp_path / name / "train.jsonl"), rows(tmp_path / name / "heldout.jsonl")
    facts = World.load(world)
    for thinking, plain in zip(*(train + heldout for train, heldout in found.values()), strict=True):
        prefix, suffix = thinking["label"]["prefix"], thinking["label"]["suffix"]
        predicted = read_prediction(thinking["answer"], thoughts=1)
        assert (predicted.thoughts, predicted.text) == ((plan_of(facts, prefix, suffix),), suffix)
        assert measure_text(facts, prefix, suffix).good
        assert plain["answer"] == plain["label"]["suffix"] == suffix
        assert plain["id"] == thinking["id"]
        assert (thinking["label"]["thoughts"], plain["label"]["thoughts"]) == (1, 0)
        assert re.fullmatch(rf"(\w+)\n{re.escape(prefix)}\n\1 continue think", thinking["prompt"])
        assert plain["prompt"] == thinking["prompt"].replace("continue think", "continue text")
    documents = [{row["label"]["document"] for row in part} for part in found["thought"]]
    assert documents[0].isdisjoint(documents[1])
    card = json.loads((tmp_path / "thought/card.json").read_text())
    assert card["parts"]["train"]["prompts"] == 60


def test_every_chunk_of_whole_sentences_has_its_own_thought(world, tmp_path):
    config = config_of(tmp_path, world / "policy", world / "train.jsonl", suffix_length=48)
    asked = ThoughtsRequest(tmp_path / "data", world=world, chunks=2, prompts=60, length=PromptLength.brief)
    build_thoughts(config, asked)
    facts, found = World.load(world), rows(tmp_path / "data/train.jsonl")
    for row in found:
        prefix, suffix, thoughts = (row["label"][key] for key in ("prefix", "suffix", "thoughts"))
        first, *later = row["answer"].removeprefix("<think> ").split("<think> ")
        assert len(later) == thoughts - 1
        assert row["prompt"].endswith(" continue think 2" if later else " continue think")
        begun = prefix
        for part in (first, *later):
            thought, chunk = part.split(" </think>")
            assert thought == plan_of(facts, begun, chunk)
            assert begun.endswith(".")
            begun += chunk
        assert begun == prefix + suffix
    assert sum(row["label"]["thoughts"] == 2 for row in found) > 50
    assert len({row["prompt"].split()[-1] for row in found}) <= 2


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("The cat", " sat. It was red. It", ("The cat sat.", " It was red.")),
        ("The cat sat.", " It was red.", ("The cat sat.", " It was red.")),
        ("The cat sat", ". It was red.", ("The cat sat.", " It was red.")),
        ("He said: \u201cThe cat", " sat.\u201d It was red.", ("He said: \u201cThe cat sat.\u201d", " It was red.")),
        ("A cat of 3", ".5 kg sat. It was red all day.", ("A cat of 3.5 kg sat.", " It was red all day.")),
        ("A cat of 3.", "5 kg sat. It was red all day.", ("A cat of 3.5 kg sat.", " It was red all day.")),
        ("\u201cIt sat.", "\u201d It was red.", ("\u201cIt sat.\u201d", " It was red.")),
        ("It is by Dr. A", ". B. See. It is red. And", ("It is by Dr. A. B. See.", " It is red.")),
        ("Steps:\n1", ". Sit. Go on and on.", ("Steps:\n1. Sit.", " Go on and on.")),
        ("wrapped\nlines", "\nof text.\nAnd so it goes", ("wrapped\nlines\nof text.", "\nAnd so it goes")),
        ("x = f(1,", " 2)\ny = g(3, 4)\nz", ("x = f(1, 2)\n", "y = g(3, 4)\n")),
        (
            "\u732b\u304c",
            "\u5ea7\u308b\u3002\u8d64\u3044\u3002",
            ("\u732b\u304c\u5ea7\u308b\u3002", "\u8d64\u3044\u3002"),
        ),
        # Too little would remain, or nothing but blanks.
        ("The cat", " sat." + 10 * " ", ("The cat", " sat.")),
        ("The cat", " sat on the red mat all day. So", ("The cat", " sat on the red mat all day.")),
        ("The cat", " sat on and on", ("The cat", " sat on and on")),
        ("It sat.", " So. It is in the red house and", ("It sat.", " So. It is in the red house and")),
    ],
)
def test_prefix_and_suffix_are_whole_sentences(tmp_path, prefix, suffix, expected):
    text = FakeText()
    episode = Episode("e", tuple(map(ord, prefix)), tuple(map(ord, suffix)), "c", "d", len(prefix))
    (piece,) = pieces_of([episode], text)
    assert (piece.prefix, piece.suffix) == expected


@pytest.mark.parametrize("suffix", ["   \n ", " He wrote <think> and thought.", " So </reasoning> it is."])
def test_blank_suffixes_and_tags_of_thoughts_are_left_out(suffix):
    episode = Episode("e", tuple(map(ord, "It sat.")), tuple(map(ord, suffix)), "c", "d", 7)
    assert pieces_of([episode], FakeText()) == []


@pytest.mark.parametrize(
    ("suffix", "chunks", "expected"),
    [
        (" A b. C d. E f. G h.", 2, [" A b. C d.", " E f. G h."]),
        (" A b. C d. E f.", 3, [" A b.", " C d.", " E f."]),
        (" A b. C d.", 4, [" A b.", " C d."]),
        (" A b c d e", 2, [" A b c d e"]),
        (" A b. ", 2, [" A b. "]),
        ("\n\na\n\n\nb", 2, ["\n\na\n", "\n\nb"]),
        (" a b. c d. " + "e " * 30 + "f.", 3, [" a b.", " c d.", " " + "e " * 30 + "f."]),
    ],
)
def test_chunks_end_with_sentences_and_none_is_empty(suffix, chunks, expected):
    steps = steps_of(Piece("p", "Start.", suffix, "d"), chunks)
    assert [one.suffix for one in steps] == expected
    assert steps[-1].prefix + steps[-1].suffix == f"Start.{suffix}"


@pytest.mark.parametrize("plain", [False, True])
def test_a_supervised_run_measures_its_answers_by_what_the_world_knows(world, tmp_path, plain):
    asked = ThoughtsRequest(
        tmp_path / "data", world=world, plain=plain, prompts=10, heldout_prompts=4, length=PromptLength.brief
    )
    build_thoughts(config_of(tmp_path, world / "policy", world / "train.jsonl"), asked)
    text = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(world / "judge")},
        "data": {
            name: [{"path": str(tmp_path / f"data/{part}.jsonl"), "prompts": True}]
            for name, part in (("sources", "train"), ("heldout", "heldout"))
        }
        | {"suffix_length": 96, "max_prefix": 400, "heldout_overlap": "skip"},
        "objective": {"name": "ntp"},
        "candidates": {"rollouts": 0},
        "teacher": {"judge": "megatron_rlpt.world.thinking:ExactContinuation", "options": {"world": str(world)}},
        "train": {"steps": 1},
        "evaluation": {"every": 1},
    }
    (tmp_path / "start.yaml").write_text(json.dumps(text))
    tokenizer = PolicyTokenizer(world / "judge")
    references = {row["prompt"]: row["answer"] for row in rows(tmp_path / "data/heldout.jsonl")}

    class Engine:
        """Gives the first prompts their reference answer, and the last one nothing."""

        def generate(self, prompts, length, version):
            asked = [tokenizer.text_of(one.prefix) for one in prompts]
            said = [next(answer for prompt, answer in references.items() if prompt in one) for one in asked]
            rows = [tuple(tokenizer.encode(one)) for one in [*said[:-1], ""]]
            return [Continuation(row, (0.0,) * len(row), "stop") for row in rows]

    repeated = build_fixed_evaluation(load_config(tmp_path / "start.yaml"), Engine(), None, tokenizer, Ranks())
    metrics = repeated.begin(0)
    assert metrics["evaluation/answers/right"] == metrics["evaluation/answers/parsed"] == pytest.approx(3 / 4)
    assert (metrics["evaluation/answers/thought_words"] == 0) is plain
    assert metrics["evaluation/answers/false_facts"] == 0


@pytest.fixture
def corpus(tmp_path) -> Path:
    draw = random.Random(2)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=90))}) + "\n" for _ in range(30)]
    (tmp_path / "other.jsonl").write_text("".join(lines))
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": " ".join(WORDS)}) + "\n")
    return tmp_path / "other.jsonl"


@pytest.fixture
def ask(tmp_path, tiny_model, corpus, monkeypatch):
    """Let a teacher think that answers with ``answer(number of the request)``; return requests and prompts."""

    def run(answer, **teacher):
        requests = []

        class Scripted:
            name = "scripted"

            def generate(self, asked):
                requests.extend(asked)
                return [answer(number) for number in range(len(asked))]

        monkeypatch.setattr(thoughts, "start_generator", lambda config, model, ranks: Scripted())

        def served(config, requests, endpoints, done):
            assert [one.url for one in endpoints] == [servers["endpoints"][0]["url"]]
            for index, reply in enumerate(Scripted().generate(requests)):
                done(index, reply)

        monkeypatch.setattr(teacher_answers, "ask_on_servers", served)
        servers = teacher.get("workers", {})
        config = config_of(tmp_path, tiny_model, tmp_path / "own.jsonl", **teacher)
        build_thoughts(config, ThoughtsRequest(tmp_path / "data", (str(corpus),), prompts=40, heldout_share=0.3))
        return requests, rows(tmp_path / "data/train.jsonl")

    return run


def said(text: str, reason: str = "stop") -> Reply:
    return Reply(text, (1,), reason)


@pytest.mark.parametrize("where", ["own model", "servers"])
def test_a_teacher_thinks_from_prefix_and_suffix(ask, tiny_model, where):
    servers = {"workers": {"endpoints": [{"url": "http://127.0.0.1:9/v1"}]}, "run_in": "workers"}
    teacher = {"path": str(tiny_model)} if where == "own model" else servers
    requests, train = ask(
        lambda number: said(f"<think>I wonder</think> Thought\n{number}."), judge="generative", **teacher
    )
    asked = [one.prompt[0].content for one in requests]
    for number, row in enumerate(train):
        prefix, suffix = row["label"]["prefix"], row["label"]["suffix"]
        assert row["answer"] == f"<think> Thought {number}. </think>{suffix}"
        assert f"]\n{prefix}\n[end beginning" in asked[number]
        assert f"]\n{suffix}\n[end passage" in asked[number]
        assert "[begin passage" not in row["prompt"], "the thinker does not see what comes next"
        assert suffix not in row["prompt"]


def test_what_has_no_thought_is_left_out_until_that_is_too_much(ask, tiny_model):
    _, train = ask(lambda number: said("") if number % 8 == 0 else said("So."), path=str(tiny_model))
    assert len(train) == 35
    with pytest.raises(TeacherError, match=r"20 of 40 thoughts failed, more than .*0.2 .*frequent: 20 x no thought"):
        ask(lambda number: said("") if number % 2 else said("So."), path=str(tiny_model))


def test_without_anybody_who_thinks_it_is_refused(ask):
    with pytest.raises(ConfigError, match=r"teacher\.path and teacher\.workers\.endpoints are empty; name"):
        ask(lambda number: said("So."))


@pytest.mark.parametrize(
    ("reply", "thought"),
    [
        (said("The cat sat.\n\nSo it is\ttired."), "The cat sat. So it is tired."),
        (said("<think>How?</think>So."), "So."),
        (said("So", "length"), "thought cut off by max_tokens"),
        (said("<think>How?"), "no thought"),
        (said("So <think> it is"), "thought with tags of a thought"),
    ],
)
def test_a_reply_is_a_thought_in_one_line_or_none(reply, thought):
    found = read_thought(reply)
    assert (found.reason if isinstance(found, Failed) else found) == thought


def test_documents_are_named_and_long_enough(tmp_path, tiny_model, corpus):
    config = config_of(tmp_path, tiny_model, tmp_path / "own.jsonl")
    with pytest.raises(ConfigError, match="neither --corpus nor --world is given"):
        build_thoughts(config, ThoughtsRequest(tmp_path / "data"))
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"cat dog {number}"}) + "\n" for number in range(40)))
    with pytest.raises(DataError, match="give 0 suffixes and no prompt of the train part; give longer documents"):
        build_thoughts(config, ThoughtsRequest(tmp_path / "data", (str(short),), plain=True))
