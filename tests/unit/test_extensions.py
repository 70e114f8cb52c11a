"""User classes: loading, checks at the start, and how their errors are reported."""

from __future__ import annotations

import asyncio
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from text_tokens import DIGITS, NUMBERS
from without_torch import run_without_torch

from launch.code import with_staged_classes
from megatron_rlpt.config import (
    SourceConfig,
    asks_teacher,
    flatten,
    judged_by_workers,
    load_config,
    longest_answer,
)
from megatron_rlpt.data.readers.documents import BadRecord, Document
from megatron_rlpt.data.readers.sources import open_source
from megatron_rlpt.errors import CheckpointError, ConfigError, DataError, TrainingError
from megatron_rlpt.evaluation.second_measure import build_second_measure
from megatron_rlpt.extensions import forget, load_extension
from megatron_rlpt.objectives import LossInputs, LossTerms, ObjectiveFacts, build_objective
from megatron_rlpt.objectives.checked import CheckedObjective
from megatron_rlpt.planner.judging import calls_per_group
from megatron_rlpt.teacher import extension_rewriters
from megatron_rlpt.teacher.batched import BatchedRewriter
from megatron_rlpt.teacher.extension_judges import CheckedGroupJudge, CheckedReward, NoTeacher
from megatron_rlpt.teacher.extension_rewriters import build_extension_rewriter
from megatron_rlpt.teacher.judges import needs_no_server
from megatron_rlpt.teacher.rewriter import answer_tokens
from megatron_rlpt.teacher.settings_fingerprint import require_same_settings, settings_fingerprint
from megatron_rlpt.trainer.run_record import require_same_run
from megatron_rlpt.types import BLANK, Candidate, Episode, Failed, Group, Reward, Source

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "configs/examples"
OBJECTIVE = """
from megatron_rlpt.objectives import ObjectiveFacts, Selection
from megatron_rlpt.types import Source

class Mine:
    facts = ObjectiveFacts(trains_on=frozenset({Source.ORIGINAL}), needs_judge=False)
    def __init__(self, strength, *, mode="a"):
        self.strength = strength
    def select(self, groups):
        return Selection()
    def loss(self, inputs):
        return 1.0
"""


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    forget()
    yield
    for name in ("mine", "other"):
        sys.modules.pop(name, None)


def load(*overrides: str):
    minimal = ["run.dir=r", "model.path=m", "train.steps=9", "data.sources=[{path: a.jsonl}]", "candidates.rollouts=0"]
    return load_config(None, [*minimal, *overrides])


def mine(text: str = OBJECTIVE, file: str = "mine.py") -> None:
    Path(file).write_text(text)


def group(*blank: bool) -> Group:
    candidates = tuple(Candidate(Source.ROLLOUT, (5, index), blank=one) for index, one in enumerate(blank))
    return Group(Episode("e", (1, 2), (3,), "c", "d", 2), candidates)


@pytest.mark.parametrize("name", ["mine.py:Mine", "mine:Mine"])
def test_a_class_loads_by_file_and_by_module_with_its_options(name):
    mine()
    config = load(f"objective.name={name}", "objective.options.strength=2")
    assert build_objective(config.objective).inner.strength == 2
    assert len(flatten(config)["objective.name.sha256"]) == 64


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        (None, [], "does not exist"),
        ("x = (", [], "cannot be imported (SyntaxError"),
        ("import torch_is_not_here", [], "cannot be imported (ModuleNotFoundError"),
        ("Mine = 3", [], "has a int of that name, not a class"),
        ("Yours = 3", [], "has no class of that name"),
        ("class Mine: pass", [], "which has no facts; it needs the class attribute facts = ObjectiveFacts(...)"),
        (OBJECTIVE.replace("def select", "def choose"), [], "which has no method select"),
        (OBJECTIVE.replace("def loss(self, inputs)", "def loss(self)"), [], "method loss does not take 1 argument"),
        (OBJECTIVE.replace("def loss", "async def loss"), [], "method loss must not be async def"),
        (OBJECTIVE, [], "objective.options lacks strength"),
        (OBJECTIVE, ["strength=1", "force=2"], "objective.options.force is no option of mine.py:Mine; its options are"),
    ],
)
def test_what_is_wrong_with_a_class_is_one_line_at_the_start(text, overrides, problem):
    if text is not None:
        mine(text)
    with pytest.raises(ConfigError) as caught:
        load("objective.name=mine.py:Mine", *(f"objective.options.{one}" for one in overrides))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "mine.py:Mine" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["objective.name=nothing"], "objective.name is 'nothing'; allowed: ntp, "),
        (["objective.name=ntp", "teacher.judge=nobody"], "teacher.judge is 'nobody'; allowed: likelihood, generative"),
        (["objective.name=ntp", "objective.options.beta=1"], "objective.options.beta is no option of ntp"),
        (["objective.name=ntp", "teacher.options.n=1"], "teacher.options has n"),
        (["objective.name=ntp", "data.sources[0].options.n=1"], "data.sources[0].options has n"),
        (
            ["objective.name=ntp", "data.sources[0].reader=csv"],
            "data.sources[0].reader is 'csv'; allowed: ",
        ),
    ],
)
def test_unknown_names_and_options_of_built_in_classes(overrides, problem):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert problem in str(caught.value)


def test_the_facts_of_an_objective_are_those_of_its_checks():
    mine(OBJECTIVE.replace("needs_judge=False", "needs_judge=False, least_rollouts=1").replace("ORIGINAL", "ROLLOUT"))
    with pytest.raises(ConfigError, match=r"candidates\.rollouts is 0; allowed: at least 1, because objective"):
        load("objective.name=mine.py:Mine", "objective.options.strength=1")


def test_what_an_objective_returns_wrongly_is_an_error_that_names_it():
    mine()
    config = load("objective.name=mine.py:Mine", "objective.options.strength=2")
    objective = build_objective(config.objective)
    with pytest.raises(TrainingError, match=r"objective mine\.py:Mine: select accounted for 0 groups of 1"):
        objective.select([group(False)])
    with pytest.raises(TrainingError, match=r"objective mine\.py:Mine: loss returned float, not LossTerms"):
        objective.loss(None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda loss: loss * math.nan, "returned a loss that is not finite"),
        (lambda loss: loss.sum(), r"returned a loss of \[\]; it has to be a tensor of \[2\] examples"),
        (lambda loss: loss.detach(), "returned a loss without a gradient"),
        (lambda loss: loss / "1", "raised TypeError"),
    ],
)
def test_a_wrong_loss_is_an_error_that_names_the_class(change, problem):
    class Inner:
        facts = ObjectiveFacts()

        def loss(self, inputs):
            return LossTerms(change(inputs.logprobs.sum(dim=1)))

    logprobs = torch.zeros(2, 3, requires_grad=True)
    inputs = LossInputs(logprobs, torch.ones(2, 3), logprobs.detach(), torch.zeros(2), (1, 1), 3)
    with pytest.raises(TrainingError, match=rf"^objective mine\.py:Mine: loss {problem}"):
        CheckedObjective(Inner(), "mine.py:Mine").loss(inputs)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ([math.nan, 1.0], "returned a reward that is not finite"),
        ([True, 1.0], "returned a reward that is no number"),
        (["1", 1.0], "returned a reward that is no number"),
        ([Failed("mine.py:Mine no"), 1.0], "no"),
        ([1.0], "returned another number of rewards"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_reward_is_a_counted_failure_that_names_the_class(returned, reason):
    class Inner:
        reads_tokens = True

        def reward(self, prefix, candidates):
            assert (prefix, candidates) == ((1, 2), [(5, 1), (5, 2)])
            return returned

    mine()
    judge = CheckedReward(Inner(), load_extension("teacher.judge", "mine.py:Mine"), NUMBERS)
    ((blank, first, second),) = (one.rewards for one in judge.judge([group(True, False, False)]))
    assert blank is BLANK
    assert isinstance(first, Failed)
    assert first.reason == f"mine.py:Mine {reason}"
    if returned is not None and len(returned) == 2:
        assert isinstance(second, Reward)
        assert second.value == 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: replace(g, rewards=(Reward(math.inf, "j", "p"), Reward(1.0, "j", "p"))), "that is not finite"),
        (lambda g: replace(g, rewards=(1.0, Reward(1.0, "j", "p"))), "that is no Reward"),
        (lambda g: replace(g, rewards=()), "returned another number of rewards"),
        (lambda g: replace(g, candidates=g.candidates[:1]), "returned another group"),
        (lambda g: None, "returned no Group"),
        (lambda g: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_wrong_group_is_a_counted_failure_that_names_the_class(change, reason):
    class Inner:
        async def judge_group(self, group, ask):
            return change(group)

    mine()
    judge = CheckedGroupJudge(Inner(), load_extension("teacher.judge", "mine.py:Mine"))
    judged = asyncio.run(judge.judge_group(group(False, False), NoTeacher()))
    assert isinstance(judged.rewards[0], Failed)
    assert judged.rewards[0].reason.startswith("mine.py:Mine ")
    assert reason in judged.rewards[0].reason


JUDGE = """
from megatron_rlpt.config.judges import JudgeFacts, TeacherUse
class Mine:
    facts = JudgeFacts(asks=TeacherUse.{asks}, questions=1.5, longest_answer=30)
    async def judge_group(self, group, ask):
        return group
"""
JUDGED = ("objective.name=rf_nll", "candidates.rollouts=3", "teacher.judge=mine.py:Mine")


def test_the_facts_of_a_judge_decide_what_is_asked_of_the_teacher():
    mine(JUDGE.format(asks="text"))
    config = load(*JUDGED)
    assert asks_teacher(config)
    assert longest_answer(config) == 30
    assert [(calls.name, calls.count) for calls in calls_per_group(config, 20)] == [("judge", 6)]
    assert not needs_no_server(config)
    with pytest.raises(
        ConfigError, match=r"own_model is true; allowed: false, because teacher\.judge=mine\.py:Mine needs"
    ):
        load(*JUDGED, "teacher.workers.own_model=true")
    forget()
    mine(JUDGE.format(asks="nothing"))
    config = load(*JUDGED, "teacher.run_in=workers")
    assert (asks_teacher(config), judged_by_workers(config), needs_no_server(config)) == (False, True, True)
    assert calls_per_group(config, 20) == ()
    with pytest.raises(
        ConfigError, match=r"own_model is true; allowed: false, because teacher\.judge=mine\.py:Mine asks no"
    ):
        load(*JUDGED, "teacher.workers.own_model=true")


REWRITER = """
from megatron_rlpt.config.judges import TeacherUse
from megatron_rlpt.config.rewriters import RewriterFacts
from megatron_rlpt.teacher.generator import Failed, Request
from megatron_rlpt.types import Candidate, Source
class Mine:
    facts = RewriterFacts(asks=TeacherUse.{asks}, longest_answer=30)
    def __init__(self, seed, said=None):
        self.said = said
    async def rewrite_one(self, episode, ask):
        return Candidate(Source.REWRITE, self.said, seed=3)
"""
PLAIN = """
class Mine:
    def __init__(self, tokenizer, said):
        self.said = said
    def rewrite(self, prefix, suffix):
        assert (prefix, suffix) == ("12", "34")
        return eval(self.said)
"""
REWRITTEN = ("objective.name=sft_rewrite", "candidates.rewrite=true", "candidates.rollouts=0")
REWRITES = (*REWRITTEN, "teacher.rewriter.name=mine.py:Mine")


def test_the_facts_of_a_rewriter_decide_what_is_asked_of_the_teacher():
    mine(REWRITER.format(asks="text"))
    config = load(*REWRITES)
    assert (asks_teacher(config), answer_tokens(config), needs_no_server(config)) == (True, 30, False)
    assert [calls.name for calls in calls_per_group(config, 20)] == ["rewrite"]
    assert len(flatten(config)["teacher.rewriter.name.sha256"]) == 64
    assert len(with_staged_classes(config)[1]) == 1
    forget()
    mine(REWRITER.format(asks="nothing"))
    config = load(*REWRITES, "teacher.run_in=workers")
    assert (asks_teacher(config), judged_by_workers(config), needs_no_server(config)) == (False, True, True)
    assert calls_per_group(config, 20) == ()


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ("suffix", (3, 4)),
        ("'56'", (5, 6)),
        ("'5678'", (5, 6)),
        ("'5'", "rewrite too short"),
        ("5", "mine.py:Mine returned neither text nor a candidate"),
        ("1/0", "mine.py:Mine raised ZeroDivisionError"),
    ],
)
def test_a_rewrite_is_checked_like_one_of_the_teacher(returned, found, monkeypatch):
    mine(PLAIN)
    monkeypatch.setattr(extension_rewriters, "PolicyTokenizer", lambda path: DIGITS)
    rewriter = build_extension_rewriter(
        load(*REWRITES, f"teacher.rewriter.options.said={returned!r}", "data.suffix_length=2")
    )
    (rewrite,) = BatchedRewriter(rewriter, NoTeacher()).rewrite([Episode("e", (1, 2), (3, 4), "c", "d", 0)])
    if isinstance(found, str):
        assert isinstance(rewrite, Failed)
        assert rewrite.reason == found
    else:
        assert isinstance(rewrite, Candidate)
        assert (rewrite.source, rewrite.tokens) == (Source.REWRITE, found)


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        ("class Mine: pass", [], "has neither a method rewrite(prefix, suffix) nor async rewrite_one(episode, ask)"),
        (REWRITER.format(asks="text").replace("async def", "def"), [], "method rewrite_one has to be async def"),
        (REWRITER.format(asks="logprobs"), [], "asks may be nothing or text"),
        (PLAIN, [], "teacher.rewriter.options lacks said"),
        (None, ["teacher.rewriter.name=magic"], "teacher.rewriter.name is 'magic'; allowed: prompted, module:Class"),
        (None, ["teacher.rewriter.options.n=1"], "teacher.rewriter.options has n, but "),
    ],
)
def test_what_is_wrong_with_a_rewriter_is_one_line_at_the_start(text, overrides, problem):
    if text is not None:
        mine(text)
    with pytest.raises(ConfigError) as caught:
        load(*(REWRITES if text else REWRITTEN), *overrides)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("class Mine: pass", "has neither a method reward(prefix, candidates) nor async judge_group(group, ask)"),
        (JUDGE.format(asks="text").replace("async def", "def"), "method judge_group has to be async def"),
        (JUDGE.format(asks="logprobs"), "asks may be nothing or text"),
        ("class Mine:\n    def reward(self, prefix): pass", "method reward does not take 2 arguments"),
    ],
)
def test_what_is_wrong_with_a_judge_is_one_line_at_the_start(text, problem):
    mine(text)
    with pytest.raises(ConfigError) as caught:
        load(*JUDGED)
    assert str(caught.value).startswith("teacher.judge is mine.py:Mine, ")
    assert problem in str(caught.value)


def test_a_data_source_counts_bad_records_resumes_and_names_itself():
    Path("a.csv").write_text("id,text\n1,one\n2\n3,three\n")
    source = SourceConfig(path="a.csv", reader=f"{EXAMPLES}/csv_source.py:CsvColumn")
    reader = open_source(source)
    first, second, third, end = (reader.read() for _ in range(4))
    assert (first, third, end) == (Document("a.csv:0", "one"), Document("a.csv:2", "three"), None)
    assert isinstance(second, BadRecord)
    assert second.reason == "no column 'text'"
    reader.seek([2])
    assert (reader.position, reader.read()) == ([2], third)
    Path("a.csv").unlink()
    with pytest.raises(DataError, match=r"csv_source\.py:CsvColumn raised FileNotFoundError.* at record 0"):
        open_source(source).read()


def test_another_source_is_refused_on_resume_and_by_workers_but_another_location_is_not():
    mine()
    overrides = ["objective.options.strength=2"]
    before = load("objective.name=mine.py:Mine", *overrides)
    flat, fingerprint = flatten(before), settings_fingerprint(before)
    Path("sub").mkdir()
    mine(file="sub/mine.py")
    moved = load("objective.name=sub/mine.py:Mine", *overrides)
    require_same_run(Path("r"), flatten(moved), flat, 1)
    require_same_settings(moved, fingerprint)
    mine(OBJECTIVE + "# changed\n")
    forget()
    changed = load("objective.name=mine.py:Mine", *overrides)
    with pytest.raises(CheckpointError, match=r"another source of objective\.name = mine\.py:Mine .*--fresh"):
        require_same_run(Path("r"), flatten(changed), flat, 1)
    with pytest.raises(ConfigError, match=r"objective\.name\.sha256 is "):
        require_same_settings(changed, fingerprint)


def test_a_launch_copies_single_files_and_refuses_packages_from_elsewhere():
    mine()
    config, files = with_staged_classes(load("objective.name=mine:Mine", "objective.options.strength=2"))
    ((copy, file),) = files.items()
    assert config.objective.name == f"{copy}:Mine"
    assert file == Path("mine.py").resolve()
    assert copy.startswith("job/classes/")
    Path("reward.py").write_text(
        "class Long:\n    def reward(self, prefix, candidates):\n        return map(len, candidates)"
    )
    judges = "evaluation.judges=[{name: a, judge: 'reward.py:Long'}]"
    config, files = with_staged_classes(load("candidates.rollouts=4", judges))
    assert [f"{copy}:Long" for copy in files] == [config.evaluation.judges[0].judge]
    Path("package").mkdir()
    mine(file="package/mine.py")
    elsewhere = load("objective.name=package.mine:Mine", "objective.options.strength=2")
    with pytest.raises(ConfigError, match=r"objective\.name is package\.mine:Mine, which is in the package of "):
        with_staged_classes(elsewhere)


MEASURE = """
class Mine:
    def __init__(self, factor=1):
        self.factor = factor
    def fit(self, documents):
        self.seen = list(documents)
    def reward(self, prefix, candidates):
        return [self.factor * len(one) + len(self.seen) for one in candidates]
"""
NTP = ("objective.name=ntp",)
SECOND = "evaluation.second_measure=mine.py:Mine"
CORPUS = "evaluation.second_corpus=[{path: other.jsonl}]"


@pytest.mark.parametrize(("text", "fitted"), [(MEASURE, 2), (MEASURE.replace("def fit", "def fitted"), 0)])
def test_a_second_measure_is_a_reward_that_may_be_fitted(text, fitted):
    mine(text.replace("len(self.seen)", "len(self.seen)" if fitted else "0"))
    Path("other.jsonl").write_text('{"text": "12"}\n{"text": "34"}\n')
    config = load(*NTP, SECOND, "evaluation.second_options.factor=10", *([CORPUS] if fitted else []))
    episode = Episode("e", (1, 2), (3,), "c", "d", 2)
    candidates = tuple(Candidate(Source.ROLLOUT, tokens) for tokens in ((5,), (5, 6)))
    [group] = build_second_measure(config, DIGITS, 10).judge([Group(episode, candidates)])
    assert [reward.value for reward in group.rewards] == [10 + fitted, 20 + fitted]
    assert len(flatten(config)["evaluation.second_measure.sha256"]) == 64


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        (MEASURE, [], "evaluation.second_corpus is empty, but mine.py:Mine has to be fitted"),
        (MEASURE.replace("def fit", "def fitted"), [CORPUS], "has no method fit(documents); remove it"),
        (MEASURE.replace("def reward", "def judge"), [CORPUS], "which has no method reward"),
        (MEASURE.replace("def fit(self, documents)", "def fit(self)"), [CORPUS], "method fit does not take 1 argument"),
        (MEASURE, [CORPUS, "evaluation.second_options.n=1"], "evaluation.second_options.n is no option"),
        (MEASURE, [CORPUS, "evaluation.second_measure=gram"], "'gram'; allowed: ngram, module:Class"),
        (MEASURE, [CORPUS, "evaluation.second_measure=ngram", "evaluation.second_options.n=1"], "takes no options"),
    ],
)
def test_what_is_wrong_with_a_second_measure_is_one_line_at_the_start(text, overrides, problem):
    mine(text)
    with pytest.raises(ConfigError) as caught:
        load(SECOND, *overrides)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_second_measure_that_cannot_be_fitted_is_one_line():
    mine(MEASURE.replace("list(documents)", "1 / 0"))
    Path("other.jsonl").write_text('{"text": "12"}\n')
    with pytest.raises(DataError, match=r"mine\.py:Mine cannot be fitted \(ZeroDivisionError.* line 6 of mine\.py\)"):
        build_second_measure(load(*NTP, SECOND, CORPUS), DIGITS, 10)


LOAD_EXAMPLES = """
from megatron_rlpt.config import load_config
for name in sys.argv[1:]:
    load_config(name)
"""


def test_the_examples_load_without_torch(monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = sorted(map(str, EXAMPLES.glob("*.yaml")))
    assert len(examples) == 4
    done = run_without_torch(LOAD_EXAMPLES, *examples)
    assert done.returncode == 0, done.stderr
