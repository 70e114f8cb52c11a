"""Judges of an evaluation: which there are, which of them are in-sample, and that no verdict is asked for twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import pytest

from megatron_rlpt.config import flatten, load_config
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.evaluation.in_sample import recorded_training, trained_by
from megatron_rlpt.evaluation.judges import comparison_group, open_judges
from megatron_rlpt.extensions import forget
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import BLANK, Episode, Failed, Reward

LONGEST = '''
from pathlib import Path
from megatron_rlpt.types import Failed

class Longest:
    """Rewards length; notes what it was asked; refuses and stops when told to."""

    def __init__(self, notes, sign=1.0):
        self.notes, self.sign = Path(notes + ".txt"), sign

    def reward(self, prefix, candidates):
        with self.notes.open("a") as file:
            file.write(prefix + "\\n")
        if (self.notes.parent / "stop").exists() and len(self.notes.read_text().splitlines()) > 3:
            raise KeyboardInterrupt
        refused = (self.notes.parent / "refuse").exists()
        return [Failed("refused") if refused else self.sign * len(text.split()) for text in candidates]
'''


@pytest.fixture
def written(tmp_path, tiny_model):
    """Return a function that writes and loads a configuration whose judge is the file ``longest.py``."""
    forget()
    (tmp_path / "longest.py").write_text(LONGEST)

    def write(*judges, **sections):
        settings = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(tiny_model), "dtype": "fp32"},
            "data": {"sources": [{"path": "corpus.jsonl"}]},
            "train": {"steps": 1},
            "teacher": {
                "judge": f"{tmp_path}/longest.py:Longest",
                "dtype": "fp32",
                "options": {"notes": str(tmp_path / "notes")},
                "max_failure_rate": 1.0,
            },
            "evaluation": {"judges": list(judges)},
        }
        for name, values in sections.items():
            settings[name] = settings.get(name, {}) | values
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        return load_config(path)

    return write


@pytest.fixture
def groups(tiny_model):
    """Six groups of a short, a longer and a blank continuation."""
    text = PolicyTokenizer(tiny_model)
    found = []
    for number, word in enumerate(("cat", "dog", "red", "sun", "tree", "house")):
        prefix = tuple(text.encode(f"the {word}"))
        episode = Episode(f"e{number}", prefix, tuple(text.encode("a b")), "c", "d", 1)
        rows = [text.encode("the"), text.encode("the dog the cat"), ()]
        found.append(comparison_group(episode, rows, text))
    return found


def asked(tmp_path) -> int:
    notes = tmp_path / "notes.txt"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def values(judged):
    return [[one.value if isinstance(one, Reward) else one for one in group.rewards] for group in judged]


def test_every_judge_has_its_name_measures_and_label(written, tmp_path):
    other = {"judge": f"{tmp_path}/longest.py:Longest", "options": {"notes": "elsewhere", "sign": -1.0}}
    config = written(
        {"name": "shortest", **other},
        {"name": "asked", "judge": "generative"},
        {"name": "same", "judge": f"{tmp_path}/longest.py:Longest", "options": {"notes": str(tmp_path / "notes")}},
        {"name": "safe", "judge": "generative", "measures": ["safety"]},
    )
    trained, untrained = flatten(config), flatten(config) | {"objective.name": "ntp"}
    judges = {one.facts.name: one for one in open_judges(config, {"sip": trained, "base": None, "ntp": untrained})}
    assert list(judges) == ["judge", "shortest", "asked", "same", "safe"]
    labels = {name: (one.facts.in_sample, one.facts.trained) for name, one in judges.items()}
    assert labels["judge"] == labels["same"] == (True, ("sip",)), "nobody rewarded next-token training"
    assert labels["shortest"] == (True, ("sip",)), "other options do not make it a stranger"
    assert labels["asked"] == labels["safe"] == (False, ())
    assert judges["judge"].measures == judges["shortest"].measures == ("quality",)
    assert judges["asked"].measures == ("quality", "coherence", "safety", "factuality")
    assert judges["safe"].measures == ("safety",)
    assert judges["asked"].prompted
    assert not judges["shortest"].prompted


def test_the_second_measure_is_in_sample_where_it_rewarded_training(written, tmp_path):
    name, options = f"{tmp_path}/longest.py:Longest", {"notes": str(tmp_path / "notes")}
    second = {"second_measure": name, "second_options": options}
    config = written(evaluation=second)
    _, found = open_judges(config, {"sip": flatten(config)})
    assert (found.facts.name, found.facts.trained) == ("second", ("sip",))


def test_a_teacher_is_known_by_its_content_and_not_by_its_path(written, tiny_model, tmp_path):
    copy, changed, gone = tmp_path / "copy", tmp_path / "changed", tmp_path / "gone" / tiny_model.name
    for folder in (copy, changed):
        shutil.copytree(tiny_model, folder)
    weights = next(changed.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    run = flatten(written(teacher={"judge": "likelihood", "options": {}}))
    recorded = {
        name: run | {"teacher.path": str(path)}
        for name, path in {"same": tiny_model, "copy": copy, "changed": changed, "gone": gone}.items()
    }
    config = written(teacher={"judge": "likelihood", "options": {}, "path": str(tiny_model)})
    (judge,) = open_judges(config, recorded)
    assert judge.facts.trained == ("same", "copy", "gone")


def test_a_judge_whose_model_wrote_the_rewrites_is_in_sample_as_well(written, tiny_model, tmp_path):
    writer = shutil.copytree(tiny_model, tmp_path / "writer")
    (writer / "config.json").write_text((writer / "config.json").read_text() + " ")
    run = flatten(written()) | {"candidates.rewrite": True}
    asking = run | {"teacher.judge": "generative", "teacher.path": str(tiny_model)}
    recorded = {
        "own": asking | {"teacher.rewriter.path": str(writer)},
        "supervised": run | {"objective.name": "sft_rewrite", "teacher.path": str(writer)},
        "served": asking | {"teacher.rewriter.endpoints[0].url": "http://w/v1"},
        "not rewritten": run | {"candidates.rewrite": False, "teacher.rewriter.path": str(writer)},
        "other": asking,
    }
    judge = {"judge": "likelihood", "options": {}}
    (by_writer,) = open_judges(written(teacher=judge | {"path": str(writer)}), recorded)
    assert by_writer.facts.trained == ("own", "supervised")
    assert trained_by({"teacher.judge": "generative", "teacher.path": str(writer)}, recorded) == ("own", "supervised")
    assert trained_by(asking, recorded) == ("own", "served", "other"), "it rewarded them"
    remote = {"teacher.judge": "generative", "model.path": "m", "teacher.workers.endpoints[0].url": "http://w/v1/"}
    assert trained_by(remote, recorded) == ("served",)


def test_served_judges_are_known_by_model_or_address(written):
    def served(**endpoint):
        return {"judge": "generative", "endpoints": [endpoint]}

    config = written(
        {"name": "a", **served(url="http://b/v1", model="big")}, {"name": "b", **served(url="http://a/v1")},
        teacher={"judge": "generative", "options": {}, "run_in": "workers",
                 "workers": {"endpoints": [{"url": "http://a/v1", "model": "big"}]}},
    )  # fmt: skip
    judges = open_judges(config, {"sip": flatten(config)})
    assert [one.facts.in_sample for one in judges] == [True, True, False]
    described = [one.facts.description.partition(",")[0] for one in judges]
    assert described == ["big", "big", "a"], "by model, else by host"


def test_the_record_of_a_run_is_found_from_its_export_and_checkpoints(tmp_path):
    run = tmp_path / "run"
    for folder in (run / "export", run / "checkpoints/step-00000002", run / "other"):
        folder.mkdir(parents=True)
    RunRecord({"a": 1}).write(run)
    for path in (run, run / "export", run / "checkpoints/step-00000002", run / "checkpoints"):
        assert recorded_training(path) == {"a": 1}, path
    assert recorded_training(run / "other") is None


def test_a_repeated_evaluation_asks_nothing(written, groups, tmp_path):
    config = written()
    first = open_judges(config, {}, cache=tmp_path / "cache")[0].judge(groups)
    assert values(first)[0] == [1.0, 4.0, BLANK]
    assert asked(tmp_path) == len(groups)
    again = open_judges(config, {}, cache=tmp_path / "cache")[0]
    assert again.judge(groups[::-1], seed=5) == first[::-1], "the judge takes no seed"
    assert asked(tmp_path) == len(groups)


def test_what_verdicts_depend_on_is_asked_anew(written, groups, tmp_path):
    cache = tmp_path / "cache"
    open_judges(written(), {}, cache=cache)[0].judge(groups)
    options = {"notes": str(tmp_path / "notes"), "sign": -1.0}
    (judge,) = open_judges(written(teacher={"options": options}), {}, cache=cache)
    assert values(judge.judge(groups))[0] == [-1.0, -4.0, BLANK]
    assert asked(tmp_path) == 2 * len(groups)
    forget()
    (tmp_path / "longest.py").write_text(LONGEST.replace("len(text.split())", "len(text)"))
    (judge,) = open_judges(written(), {}, cache=cache)
    assert values(judge.judge(groups))[0] == [4.0, 16.0, BLANK]


def test_a_killed_evaluation_goes_on(written, groups, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_rlpt.evaluation.verdicts.BLOCK", 1)
    (tmp_path / "stop").touch()
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        open_judges(written(), {}, cache=cache)[0].judge(groups)
    (tmp_path / "stop").unlink()
    (tmp_path / "notes.txt").unlink()
    (file,) = cache.glob("*/0.jsonl")
    file.write_text(file.read_text() + '{"key": "cut off')
    judged = open_judges(written(), {}, cache=cache)[0].judge(groups)
    assert asked(tmp_path) == len(groups) - 3
    assert all(row == [1.0, 4.0, BLANK] for row in values(judged))
    (tmp_path / "notes.txt").unlink()
    open_judges(written(), {}, cache=cache)[0].judge(groups)
    assert asked(tmp_path) == 0, "what came after the line that was cut off is found"


def test_failures_are_asked_again_and_too_many_stop(written, groups, tmp_path):
    cache, refuse = tmp_path / "cache", tmp_path / "refuse"
    refuse.touch()
    judged = open_judges(written(), {}, cache=cache)[0].judge(groups)
    assert values(judged)[0] == [Failed("refused"), Failed("refused"), BLANK]
    with pytest.raises(TeacherError, match="12 of 12"):
        open_judges(written(teacher={"max_failure_rate": 0.5}), {}, cache=cache)[0].judge(groups)
    refuse.unlink()
    judged = open_judges(written(), {}, cache=cache)[0].judge(groups)
    assert values(judged)[0] == [1.0, 4.0, BLANK]


def test_mistakes_in_the_list_of_judges(written, tmp_path, subtests):
    same = {"judge": "likelihood"}
    cases = {
        r"evaluation\.judges\[0\]\.name is 'a b'": [{"name": "a b", **same}],
        r"evaluation\.judges\[0\]\.name is second, the name of evaluation.second_measure": [{"name": "second", **same}],
        r"evaluation\.judges\[1\]\.name is a, the name of evaluation.judges\[0\]": [{"name": "a", **same}] * 2,
        r"evaluation\.judges\[0\]\.judge is 'gpt'; allowed: likelihood": [{"name": "a", "judge": "gpt"}],
        r"evaluation\.judges\[0\]\.options has x, but": [{"name": "a", "options": {"x": 1}, **same}],
        r"evaluation\.judges\[0\]\.options lacks notes": [{"name": "a", "judge": f"{tmp_path}/longest.py:Longest"}],
        r"evaluation\.judges\[0\]\.measures has 'taste'": [{"name": "a", "measures": ["taste"], **same}],
        r"evaluation\.judges\[0\]\.endpoints\[0\]\.url": [{"name": "a", "endpoints": [{"url": "x"}], **same}],
        r"evaluation\.judges\[0\]\.path is empty; name the folder of the model": [
            {"name": "a", "endpoints": [{"url": "http://h/v1"}], **same}
        ],
        r"evaluation\.judges\[0\]\.generative\.temperature is -1": [
            {"name": "a", "judge": "generative", "generative": {"temperature": -1}}
        ],
    }  # fmt: skip
    for message, judges in cases.items():
        with subtests.test(message=message), pytest.raises(ConfigError, match=message):
            written(*judges)
    config = written({"name": "a", **same}, teacher={"options": {"notes": "n"}})
    assert asdict(config)["evaluation"]["judges"][0]["name"] == "a"


def test_one_more_candidate_is_judged_alone(written, groups, tmp_path):
    """Models are added to an evaluation one by one."""
    config = written()
    few = [replace(group, candidates=group.candidates[:1]) for group in groups]
    (judge,) = open_judges(config, {}, cache=tmp_path / "cache")
    assert values(judge.score(few)) == [[1.0]] * 6
    assert asked(tmp_path) == 6
    (again,) = open_judges(config, {}, cache=tmp_path / "cache")
    assert not again.is_relative
    assert values(again.score(groups)) == [[1.0, 4.0, BLANK]] * 6
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    assert len(notes) == 12
    (last,) = open_judges(config, {}, cache=tmp_path / "cache")
    assert values(last.score(groups)) == [[1.0, 4.0, BLANK]] * 6
    assert asked(tmp_path) == 12


class Undecided:
    """A teacher that calls every comparison a tie."""

    name = "undecided"

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return [Reply('{"reasoning": "Neither.", "verdict": "tie"}', (1,), "stop") for _ in requests]


def test_a_prompted_judge_compares_pairs_and_remembers(written, groups, tmp_path, monkeypatch):
    teacher = Undecided()
    monkeypatch.setattr("megatron_rlpt.evaluation.verdicts.ConfiguredVerdicts._start", lambda self: teacher)
    pairs = [replace(group, candidates=group.candidates[:2]) for group in groups]
    judge = open_judges(written({"name": "asked", "judge": "generative"}), {}, cache=tmp_path / "cache")[1]
    assert values(judge.compare(pairs, 0, "coherence")) == [[0.5, 0.5]] * 6
    assert len(teacher.requests) == 12
    assert all("repeats itself less" in request.prompt[0].content for request in teacher.requests)
    judge.compare(pairs, 0, "coherence")
    assert len(teacher.requests) == 12
    for seed, question in ((1, "coherence"), (0, "facts")):
        judge.compare(pairs, seed, question)
    assert len(teacher.requests) == 36
