"""samples.jsonl explains the choices; resumed runs repeat no step."""

import json

import pytest
from text_tokens import FakeText

from megatron_rlpt.observe import SampleTable
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source


def decode(tokens):
    return " ".join(f"t{token}" for token in tokens)


def group(name, judged=True):
    candidates = (
        Candidate(Source.ORIGINAL, (3, 4)),
        Candidate(Source.ROLLOUT, (5, 6), policy_version=2, seed=11, finish_reason="length"),
        Candidate(Source.ROLLOUT, (7, 8), policy_version=2, seed=12, finish_reason="stop"),
    )
    rewards = (
        Reward(1.0, "likelihood", "v1", {"repeated": float("nan")}),
        Reward(0.5, "likelihood", "v1"),
        Failed("malformed verdict", {"reply": "ähm"}),
    )
    return Group(Episode(name, (1, 2), (3, 4), "web", "doc#1", 2), candidates, rewards if judged else ())


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_everything_needed_to_explain_a_choice(tmp_path):
    path = tmp_path / "samples.jsonl"
    with SampleTable(path, 2, FakeText(decode)) as table:
        table.write(4, [group("a"), group("b"), group("c")], {"a": (0, 1, None), "b": (None, None, "tie")})
    first, second = rows(path)
    assert (first["step"], first["episode"], first["prefix"]) == (4, "a", "t1 t2")
    assert (first["corpus"], first["document"], first["offset"]) == ("web", "doc#1", 2)
    assert (first["chosen"], first["rejected"], first["skipped"]) == (0, 1, None)
    original, rollout, failed = first["candidates"]
    assert original == {
        "source": "original",
        "text": "t3 t4",
        "version": None,
        "seed": None,
        "finish_reason": None,
        "value": 1.0,
        "judge": "likelihood",
        "prompt_version": "v1",
        "detail": {"repeated": None},
    }
    assert (rollout["source"], rollout["version"], rollout["seed"], rollout["value"]) == ("rollout", 2, 11, 0.5)
    assert failed["failed"] == "malformed verdict"
    assert failed["detail"] == {"reply": "ähm"}
    assert "value" not in failed
    assert (second["chosen"], second["rejected"], second["skipped"]) == (None, None, "tie")


def test_groups_that_were_never_judged(tmp_path):
    with SampleTable(tmp_path / "s.jsonl", 1, FakeText(decode)) as table:
        table.write(0, [group("a", judged=False)], {"a": (0, None, None)})
    (row,) = rows(tmp_path / "s.jsonl")
    assert all("value" not in candidate and "failed" not in candidate for candidate in row["candidates"])


def test_nothing_per_step_writes_nothing(tmp_path):
    with SampleTable(tmp_path / "s.jsonl", 0, FakeText(decode)) as table:
        table.write(0, [group("a")], {})
    assert rows(tmp_path / "s.jsonl") == []


@pytest.mark.parametrize("selection", [{}, {"a": (3, 0, None)}, {"a": (0, -1, None)}])
def test_a_selection_that_does_not_fit_is_refused(tmp_path, selection):
    with SampleTable(tmp_path / "s.jsonl", 1, FakeText(decode)) as table, pytest.raises(ValueError, match="episode a"):
        table.write(0, [group("a")], selection)


def test_resume_keeps_each_step_once(tmp_path):
    path = tmp_path / "s.jsonl"
    picks = {"a": (0, 1, None), "b": (0, 1, None)}
    with SampleTable(path, 2, FakeText(decode)) as table:
        for step in range(4):
            table.write(step, [group("a"), group("b")], picks)
    with path.open("a") as file:
        file.write('{"step": 4, "epi')
    with SampleTable(path, 2, FakeText(decode), start=2) as table:
        for step in range(2, 5):
            table.write(step, [group("a"), group("b")], picks)
    assert [row["step"] for row in rows(path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
