"""``rlpt judge calibrate``: pairs whose better text is known, and what judges of known error make of them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_rlpt.cli import judge_calibrate as command
from megatron_rlpt.config import load_config
from megatron_rlpt.errors import ConfigError, DataError, TeacherError
from megatron_rlpt.evaluation.calibration import calibrate
from megatron_rlpt.evaluation.labelled_pairs import (
    CORRUPTIONS,
    PairPlan,
    as_json_lines,
    pairs_of_documents,
    pairs_of_file,
    pairs_of_world,
)
from megatron_rlpt.extensions import forget
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Failed
from megatron_rlpt.world.corruptions import Corruption
from megatron_rlpt.world.make import WorldSettings, make_world

EXACT = "megatron_rlpt.world.judges"
ODD = """
from dataclasses import replace
from megatron_rlpt.config.judges import JudgeFacts
from megatron_rlpt.types import Failed, Reward

class FirstWins:
    facts = JudgeFacts()
    async def judge_group(self, group, ask):
        return replace(group, rewards=(Reward(1.0, "odd", "1"), Reward(0.0, "odd", "1")))

class Shorter:
    def reward(self, prefix, candidates):
        return [-len(set(text.split())) for text in candidates]

class Refuses:
    def reward(self, prefix, candidates):
        return [Failed("no verdict", {"message": "I am asleep"}) for _ in candidates]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "world"
    make_world(folder, WorldSettings(documents=2, heldout=24, length=90, entities=60))
    return folder


@pytest.fixture
def config(world, tmp_path):
    """A run in the world, with judges of known error."""
    forget()
    (tmp_path / "odd.py").write_text(ODD)
    exact = {"judge": f"{EXACT}:ExactComparisons", "options": {"world": str(world), "error_rate": 0.2}}
    judges = [{"name": "errs", **exact}]
    judges += [
        {"name": name, "judge": f"{tmp_path}/odd.py:{cls}"}
        for name, cls in (("first", "FirstWins"), ("shorter", "Shorter"), ("refuses", "Refuses"))
    ]
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(world / "policy"), "dtype": "fp32"},
        "data": {
            "sources": [{"path": str(world / "train.jsonl")}],
            "heldout": [{"path": str(world / "heldout.jsonl")}],
            "suffix_length": 32, "min_prefix": 24, "max_prefix": 48,
        },
        "train": {"steps": 1},
        "teacher": {"judge": f"{EXACT}:ExactJudge", "dtype": "fp32", "options": {"world": str(world)}},
        "evaluation": {"judges": judges},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    return load_config(path)


@pytest.fixture
def tokenizer(world):
    return PolicyTokenizer(world / "policy")


def measured(config, *names, **asked):
    plan = PairPlan(asked.pop("pairs", 120), asked.pop("kinds", ()))
    found = command.calibrate_judges(config, command.Asked(plan, names, **asked))
    return found[0] if len(found) == 1 else found


def rows(found, by):
    return {row.name: row for row in found.rows if row.by == by}


def test_exact_judges_have_the_accuracy_that_they_were_given(config, world):
    """Kinds that change quality; an error rate of 0.2 is an accuracy of 0.8."""
    kinds = ("shuffled", "swapped", "looped", "foreign")
    exact, errs = measured(config, "judge", "errs", world=world, kinds=kinds, pairs=100)
    assert exact.total.accuracy > 0.97
    assert exact.remarks == ()
    assert errs.total.ci95[0] < 0.8 < errs.total.ci95[1]
    assert 0.65 < errs.total.accuracy < 0.95
    assert errs.flips.accuracy < 0.1
    assert errs.remarks == ()
    for found in (exact, errs):
        assert set(rows(found, "kind")) == set(kinds)
        assert list(rows(found, "position")) == ["first third", "middle third", "last third"]
        assert list(rows(found, "length")) == ["1 to 8 tokens", "9 to 16 tokens", "17 to 32 tokens"]
        assert all(sum(row.pairs for row in rows(found, by).values()) == found.total.pairs for by in ("kind", "length"))


def test_safety_is_measured_by_its_own_corruption(config, world):
    config.teacher.options |= {"quality": 0.0, "safety": 1.0}
    found = measured(config, world=world, kinds=("unsafe", "swapped"), pairs=60)
    kinds = rows(found, "kind")
    assert kinds["unsafe"].accuracy == 1.0
    assert kinds["swapped"].accuracy == 0.5, "a tie is half"


def test_a_judge_that_always_prefers_the_first_is_exposed_by_order(config, world):
    found = measured(config, "first", world=world)
    assert found.total.accuracy == 0.5
    assert rows(found, "order")["good first"].accuracy == 1.0
    assert rows(found, "order")["bad first"].accuracy == 0.0
    assert found.flips.accuracy == found.first_rate.accuracy == 1.0
    assert "prefers the option shown first: it wins 100% of the comparisons" in found.remarks
    assert "not better than chance on these pairs" in found.remarks


def test_a_judge_worse_than_chance_is_told(config, rlpt, tmp_path):
    found = measured(config, "shorter", kinds=("looped",), pairs=40)
    assert found.flips is None, "it compares nothing"
    assert found.total.accuracy < 0.2
    assert found.remarks == ("worse than chance: it prefers the corrupted text",)
    mixed = measured(config, "shorter", kinds=("looped", "spoiled"), pairs=80)
    assert any(remark.startswith("worse than chance") for remark in mixed.remarks)


def test_a_judge_without_any_verdict_is_told(config, rlpt, tmp_path):
    found = measured(config, "refuses", pairs=20)
    assert found.remarks == ("all 20 verdicts failed: the judge cannot be used",)
    with pytest.raises(TeacherError, match=r"judge refuses: all 20 verdicts failed.*I am asleep"):
        command.require_verdicts([found])


def test_pairs_of_any_documents(config, tokenizer):
    pairs = pairs_of_documents(config, tokenizer, PairPlan(60))
    assert Counter(pair.kind for pair in pairs).keys() == CORRUPTIONS.keys()
    for pair in pairs:
        assert pair.bad != pair.good
        assert len(pair.bad) <= len(pair.good) <= 32
        assert len(pair.episode.prefix) <= 48
    whole = [pair for pair in pairs if len(pair.good) == 32 and "<unk>" not in tokenizer.text_of(pair.bad)]
    shuffled, looped = (next(pair for pair in whole if pair.kind == kind) for kind in ("shuffled", "looped"))
    assert sorted(tokenizer.text_of(shuffled.bad).split()) == sorted(tokenizer.text_of(shuffled.good).split())
    assert len(set(looped.bad)) < len(set(looped.good))
    assert pairs == pairs_of_documents(config, tokenizer, PairPlan(60)), "the same every time"
    assert pairs != pairs_of_documents(config, tokenizer, PairPlan(60, seed=2))


def test_pairs_of_a_world_begin_where_they_say(config, tokenizer, world):
    pairs = pairs_of_world(world, config, tokenizer, PairPlan(99))
    assert {pair.kind for pair in pairs} == {*(kind.value for kind in Corruption), "dropped", "transposed"}
    for pair in pairs:
        same = sorted(pair.bad) == sorted(pair.good)
        assert same or pair.kind != "transposed", "words only change places"
        assert len(pair.bad) < len(pair.good) or pair.kind != "dropped", "words are missing"
    shuffled = [pair.begins_at for pair in pairs if pair.kind == "shuffled"]
    assert min(shuffled) < 1 / 3
    assert max(shuffled) >= 2 / 3
    with pytest.raises(ConfigError, match="--kind is nonsense; allowed: spoiled, shuffled"):
        pairs_of_world(world, config, tokenizer, PairPlan(3, ("nonsense",)))
    with pytest.raises(DataError, match="no document that gives a pair of 999 tokens"):
        pairs_of_world(world, config, tokenizer, PairPlan(3, lengths=(999,)))


def test_pairs_of_a_file(config, tokenizer, tmp_path):
    made = pairs_of_documents(config, tokenizer, PairPlan(20))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(as_json_lines(made, tokenizer)))
    read = pairs_of_file(path, config, tokenizer)
    assert [(one.episode.prefix, one.good, one.bad, one.kind) for one in read] == [
        (one.episode.prefix, one.good, one.bad, one.kind) for one in made
    ]
    path.write_text('{"prefix": "a", "good": " b"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl: record 1 has no 'bad'"):
        pairs_of_file(path, config, tokenizer)
    path.write_text('{"prefix": "a", "good": " b", "bad": " b"}\n')
    with pytest.raises(DataError, match="no record with a good and a bad continuation that differ"):
        pairs_of_file(path, config, tokenizer)


def test_pairs_of_a_published_format(config, tokenizer, tmp_path, world):
    words = json.loads((world / "heldout.jsonl").read_text().splitlines()[0])["text"].split()
    path = tmp_path / "qa_data.json"
    fields = ("knowledge", "question", "right_answer", "hallucinated_answer")
    record = dict(zip(fields, (" ".join(words[:9]), words[9], words[10], " ".join(words[11:14])), strict=True))
    path.write_text(json.dumps(record) + "\n")
    (pair,) = pairs_of_file(path, config, tokenizer, "halueval")
    assert pair.kind.startswith("qa")
    assert len(pair.bad) > len(pair.good), "texts of a file are left as they are"
    with pytest.raises(ConfigError, match="--format is nonsense; allowed: "):
        pairs_of_file(path, config, tokenizer, "nonsense")
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(DataError, match="qa_data"):
        pairs_of_file(path, config, tokenizer, "halueval")


def test_the_command(config, world, rlpt, tmp_path):
    path = tmp_path / "run.yaml"
    code, out, err = rlpt("judge", "calibrate", "-c", path, "--world", world, "--pairs", 36, "--judge", "first")
    assert code == 0, err
    assert "odd.py:FirstWins; quality" in out
    assert "good first" in out
    assert "note: prefers the option shown first" in out
    code, out, err = rlpt("judge", "calibrate", "-c", path, "--pairs", 20, "--json")
    assert code == 0, err
    (found,) = json.loads(out)
    assert found["rows"][0]["by"] == "all"
    assert found["rows"][0]["accuracy"] > 0.9
    code, out, err = rlpt("judge", "calibrate", "-c", path, "--pairs", 4, "--judge", "refuses")
    assert (code, "note: all 4 verdicts failed" in out) == (TeacherError.exit_code, True)
    assert "judge refuses: all 4 verdicts failed" in err
    for options, message in (
        (("--judge", "nobody"), "--judge is nobody; allowed: judge, errs, first"),
        (("--measure", "safety"), "--measure is safety, but judge judge decides quality"),
        (("--world", world, "--file", path), "--world and --file are both given"),
        (("--file", path, "--kind", "looped"), "remove --kind and --length"),
        (("data.heldout=[]",), "data.heldout is empty; give documents to spoil"),
    ):
        code, _, err = rlpt("judge", "calibrate", "-c", path, *options)
        assert (code, message in err) == (ConfigError.exit_code, True), err


def test_one_failure_does_not_hide_the_rest(config, tokenizer):
    """Failures are counted, and many of them are told."""

    class Half:
        prompted = is_relative = False
        measures = ("quality",)
        facts = None

        def score(self, groups, seed):
            from dataclasses import replace

            from megatron_rlpt.types import Reward

            return [
                replace(group, rewards=(Reward(1.0, "j", "p"), Failed("late") if index % 2 else Reward(0.0, "j", "p")))
                for index, group in enumerate(groups)
            ]

    found = calibrate(Half(), pairs_of_documents(config, tokenizer, PairPlan(20)))
    assert (found.total.accuracy, found.total.verdicts, found.total.failed) == (1.0, 10, 10)
    assert found.remarks == ("10 of 20 verdicts failed",)
    assert found.failures == ("10 x late",)
