"""``rlpt judge try``: the servers it uses, its output, and its exit code if nothing was judged."""

from __future__ import annotations

import json

import pytest

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.cli import judge_try as trial
from megatron_rlpt.config import EndpointConfig, load_config
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.judge_workers.discovery import KIND, announcement
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

TEXTS = ("the cat", "a dog")
NOBODY = "http://127.0.0.1:1/v1"


def judged(*rewards) -> Group:
    candidates = tuple(Candidate(Source.ROLLOUT, (index,)) for index in range(len(rewards)))
    return Group(Episode("e", (1,), (2,), "c", "d", 1), candidates, rewards)


@pytest.fixture
def config_of(tiny_model, tmp_path):
    """Write the configuration of a run with the given teacher."""

    def write(**teacher):
        settings = {
            "run": {"dir": str(tmp_path)},
            "model": {"path": str(tiny_model)},
            "data": {"sources": [{"path": str(tmp_path / "corpus.jsonl")}]},
            "candidates": {"rollouts": 3},
            "train": {"steps": 2, "global_batch": 4, "micro_batch": 2},
            "teacher": teacher,
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        return path

    return write


@pytest.fixture
def judge_try(rlpt):
    """Run the command on two candidates; return exit code, standard output and standard error."""
    return lambda config: rlpt(
        "judge", "try", "-c", config, "--prefix", "the", *(part for text in TEXTS for part in ("--candidate", text))
    )


def test_scores_are_shown_best_first_and_failures_last():
    shown = trial.describe(judged(Failed("no verdict"), Reward(-1.5, "j", "p"), Reward(2.0, "j", "p")), "abc")
    assert [line.split()[-1] for line in shown.splitlines()] == ["c", "b", "a"]
    assert "failed (no verdict)" in shown.splitlines()[-1]


def test_all_of_it_is_there_as_json():
    first, second = json.loads(trial.describe(judged(Failed("no verdict"), Reward(2.0, "j", "p")), "ab", as_json=True))
    assert (first["text"], first["failed"], first["reason"]) == ("a", True, "no verdict")
    assert (second["failed"], second["value"]) == (False, 2.0)


def test_an_announced_server_is_asked(config_of, judge_try):
    config = config_of(run_in="workers", workers={"request_deadline": 1.0})
    with_it = open_buffer(load_config(config))
    with_it.announce(KIND, "a", announcement(EndpointConfig(url=NOBODY)), 60.0)
    with_it.close()
    code, _, err = judge_try(config)
    assert code == TeacherError.exit_code
    assert NOBODY in err


@pytest.mark.parametrize("opened", [False, True])
def test_without_any_server_one_is_asked_for(config_of, judge_try, opened):
    config = config_of(run_in="workers")
    if opened:
        open_buffer(load_config(config)).close()
    code, out, err = judge_try(config)
    assert (code, out) == (ConfigError.exit_code, "")
    assert err.startswith("error: teacher.workers.endpoints is empty and no server is found (")
    assert "--url" in err
    assert (config.parent / "buffer.sqlite").exists() == opened, "looking makes no buffer"


@pytest.mark.parametrize("teacher", [{"run_in": "trainer"}, {"run_in": "workers", "workers": {"own_model": True}}])
def test_where_no_server_is_asked_it_judges_by_itself(config_of, judge_try, teacher):
    code, out, err = judge_try(config_of(**teacher))
    assert code == 0, err
    assert all(text in out for text in TEXTS)


def test_when_all_fail_that_is_shown_and_the_exit_code_says_so(config_of, judge_try, monkeypatch):
    group = judged(Failed("empty reply"), Failed("timeout"), Failed("timeout"))
    monkeypatch.setattr(trial, "try_judge", lambda *_: Group(group.episode, group.candidates[1:], group.rewards[1:]))
    code, out, err = judge_try(config_of())
    assert code == TeacherError.exit_code
    assert out.count("failed (timeout)") == 2
    assert err.strip() == "error: no candidate has a reward; 2 of 2 failed with: timeout"
    with pytest.raises(TeacherError, match=r"2 of 3 failed with: timeout"):
        trial.require_score(group)
    trial.require_score(judged(Failed("timeout"), Reward(0.0, "j", "p")))
