"""The accuracy of a judge by axis: measured on what rlpt teacher data holds out, kept in its folder, asked for."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hostile_server import Exchange, chat, says, serving

from megatron_rlpt.config import load_config
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair
from megatron_rlpt.evaluation.labelled_texts import as_json_lines, texts_of_file, texts_of_pairs
from megatron_rlpt.teacher.judge_card import FILE, accuracy_lines, accuracy_notes
from megatron_rlpt.teacher_training.build import build_teacher_data
from megatron_rlpt.teacher_training.request import DataRequest
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Episode
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.measures import measure_text

FENCED = re.compile(r"\[begin ([a-z]+(?: \d)?) (\S+)\]\n(.*?)\n\[end \1 \2\]", re.DOTALL)
NOWHERE = "http://127.0.0.1:1/v1"
AXES = ("quality", "safety", "factuality")


def says_verdict(verdict: str):
    return says(chat(json.dumps({"reasoning": "So it is.", "verdict": verdict})))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "world"
    make_world(folder, WorldSettings(entities=24, documents=4, heldout=30, teacher=60))
    return folder


@pytest.fixture(scope="module")
def exact(world):
    """A server's behavior: it judges by the world's measures."""
    known = World.load(world)

    async def behave(exchange: Exchange) -> bool | None:
        texts = {name: text for name, _, text in FENCED.findall(exchange.body["messages"][-1]["content"])}
        if "continuation 1" in texts:
            quality = [measure_text(known, texts["beginning"], texts[f"continuation {one}"]).quality for one in (1, 2)]
            return await says_verdict("1" if quality[0] > quality[1] else "2")(exchange)
        if "reference" in texts:
            measures = measure_text(known, texts["beginning"], texts["continuation"])
            return await says_verdict(measures.hallucination.value)(exchange)
        return await says_verdict("safe" if measure_text(known, "", texts["text"]).safe else "unsafe")(exchange)

    return behave


def settings(world, folder, url=NOWHERE):
    """Return the configuration of a run whose judge decides all axes, served at ``url``."""
    axes = {"weight": 1.0, "votes": 2}
    return {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(world / "policy"), "dtype": "fp32"},
        "data": {
            "sources": [{"path": str(world / "train.jsonl")}],
            "suffix_length": 24, "min_prefix": 12, "max_prefix": 48,
        },
        "train": {"steps": 1},
        "teacher": {
            "judge": "generative", "dtype": "fp32", "path": str(folder / "judge"),
            "generative": {"safety": axes, "factuality": axes},
            "workers": {"endpoints": [{"url": url}]},
        },
    }  # fmt: skip


def write_settings(world, folder, **more):
    (folder / "run.yaml").write_text(json.dumps(settings(world, folder, **more)))
    return folder / "run.yaml"


@pytest.fixture
def run(world, tmp_path):
    """Write the configuration of a run with the judge at ``url``, and return its file."""
    (tmp_path / "judge").mkdir()
    return lambda url: write_settings(world, tmp_path, url=url)


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    """What rlpt teacher data makes of the world, with all axes."""
    folder = tmp_path_factory.mktemp("teacher")
    asked = DataRequest(folder / "data", world=world, axes=AXES, pairs=60, heldout_pairs=60, heldout_share=0.4)
    build_teacher_data(load_config(write_settings(world, folder)), asked)
    return folder / "data"


def test_every_axis_is_measured_saved_and_asked_for(run, data, exact, rlpt, tmp_path):
    assert len(accuracy_notes(load_config(run(NOWHERE)))) == 3, "nothing is known yet"
    with serving(exact) as server:
        code, out, err = rlpt("judge", "calibrate", "-c", run(server.url), "--data", data, "--save", "--json")
    assert code == 0, err
    found = {one["measure"]: one for one in json.loads(out)}
    assert err.count("saved the accuracy on ") == 3
    assert list(found) == list(AXES)
    for axis in ("safety", "factuality"):
        total, *rows = found[axis]["rows"]
        assert total["accuracy"] > 0.97, "a sentence that the prefix begins is not shown to a judge of safety"
        assert total["verdicts"] == 2 * total["pairs"], "both votes"
        assert {row["by"] for row in rows} == {"verdict", "kind", "length"}
        counts = {row["name"]: row["pairs"] for row in rows if row["by"] == "verdict"}
        assert len(set(counts.values())) == 1, "as many of every verdict"
    card = json.loads((tmp_path / "judge" / FILE).read_text())["measured"]
    assert set(card) == {f"{axis}, reasoned, full" for axis in AXES}
    assert card["quality, reasoned, full"]["pairs"] == len((data / "heldout_pairs.jsonl").read_text().splitlines())
    assert card["safety, reasoned, full"]["texts"] == found["safety"]["rows"][0]["pairs"]
    config = load_config(run(NOWHERE))
    assert accuracy_notes(config) == []
    assert [line.partition(":")[0] for line in accuracy_lines(config)] == list(AXES)
    with serving(exact) as server:
        where = ("--prefix", "x", "--candidate", "one", "--candidate", "two")
        _, out, _ = rlpt("judge", "try", "-c", run(server.url), *where, "teacher.generative.prompt=brief")
    assert out.count("nobody has measured how often the judge is right on") == 3, "with brief prompts it is another"


def test_a_judge_that_always_says_one_word_is_exposed(run, data, rlpt):
    with serving(says_verdict("possible")) as server:
        code, out, err = rlpt(
            "judge", "calibrate", "-c", run(server.url), "--data", data, "--measure", "factuality", "--json"
        )
    assert code == 0, err
    (found,) = json.loads(out)
    assert found["rows"][0]["accuracy"] == pytest.approx(1 / 3)
    assert found["remarks"][0].startswith("not better than always saying ")
    assert found["remarks"][1] == "says possible in 100% of its verdicts, which is right for 33% of the texts"


def test_texts_of_a_file_and_of_a_world(run, world, exact, rlpt, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"The town {word}.", "verdict": "safe"}) + "\n" for word in ("is", "of"))
    )
    with serving(exact) as server:
        code, out, err = rlpt("judge", "calibrate", "-c", run(server.url), "--file", path, "--json")
        assert code == 0, err
        (found,) = json.loads(out)
        assert (found["measure"], found["counted"], found["rows"][0]["accuracy"]) == ("safety", "texts", 1.0)
        options = ("--world", world, "--measure", "safety", "--pairs", 36)
        code, out, err = rlpt("judge", "calibrate", "-c", run(server.url), *options)
    assert code == 0, err
    assert "all texts" in out
    assert "unsafe" in out


def test_what_a_file_cannot_hold_is_no_text(world, tmp_path):
    text = PolicyTokenizer(world / "policy")
    stops, start = tuple(text.encode(".")) * 6, tuple(text.encode("Nobody knows why"))
    config = load_config(write_settings(world, tmp_path))
    pair = LabelledPair(Episode("e", start, tuple(text.encode(". It is rumored .")), "c", "d", 3), stops, "looped")
    found = texts_of_pairs(World.load(world), [pair], text, "safety", 1)
    assert [one.kind for one in found] == ["original"]
    (tmp_path / "texts.jsonl").write_text("".join(as_json_lines(found, text)))
    assert [one.verdict for one in texts_of_file(tmp_path / "texts.jsonl", config, text)] == ["safe"]


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        (("--data", "nowhere"), DataError, "nowhere has neither heldout_pairs.jsonl nor heldout_texts.jsonl"),
        (("--data", "nowhere", "--world", "w"), ConfigError, "--data and --world are both given"),
        (("--file", "bad"), DataError, "bad: record 1 has the verdict 'fine'; allowed: safe, unsafe, none"),
        (("--file", "strange"), DataError, "record 1 has a text of which the tokenizer of model.path knows nothing"),
        (("--file", "pairs", "--measure", "safety", "--save"), ConfigError, "--save of safety needs texts"),
        (("--file", "texts", "teacher.judge=likelihood"), ConfigError, "judge judge gives rewards and no verdicts"),
        (("--file", "texts", "--measure", "factuality"), ConfigError, "texts has nothing to measure it on; remove it"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run, exact, rlpt, tmp_path, monkeypatch, options, error, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text('{"text": "is", "verdict": "fine"}\n')
    (tmp_path / "texts").write_text('{"text": "is", "verdict": "safe"}\n' * 2)
    pair = json.dumps({"prefix": "the town", "good": " lies", "bad": " of"}) + "\n"
    (tmp_path / "pairs").write_text(pair * 3)
    (tmp_path / "strange").write_text('{"text": "xyzzy", "verdict": "safe"}\n')
    with serving(exact) as server:
        code, _, err = rlpt("judge", "calibrate", "-c", run(server.url), *options)
    assert (code, problem in err) == (error.exit_code, True), err


def test_labels_are_balanced_and_texts_go_on_otherwise_than_the_reference(data):
    texts = [json.loads(line) for line in (data / "heldout_texts.jsonl").read_text().splitlines()]
    factual = [one for one in texts if "reference" in one]
    assert Counter(one["verdict"] for one in factual).keys() == {"none", "possible", "definite"}
    true = [one for one in factual if one["verdict"] == "none"]
    assert sum(one["text"] == one["reference"] for one in true) < len(true) / 2
    train = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    factual = [one for one in train if one["label"]["axis"] == "factuality"]
    counts = Counter(one["label"]["verdict"] for one in factual)
    assert len(set(counts.values())) == 1
    assert {json.loads(one["answer"])["verdict"] for one in factual} == counts.keys()
