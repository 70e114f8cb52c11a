"""Judging capacity: servers, workers, deadlines, and a teacher inside the trainer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from plan_cases import RECIPES, ROOT, command, planned
from plan_requests import plan_request
from typer.testing import CliRunner

from launch.cluster import TeacherResources as ServedTeacher
from megatron_rlpt.cli.main import app
from megatron_rlpt.planner.judge_cluster import WORKER_CONCURRENCY
from megatron_rlpt.planner.plan import make_plan

RECIPE = {recipe.stem: recipe for recipe in RECIPES}
IN_TRAINER = ("teacher.run_in=trainer", "train.staleness=0", "teacher.kv_cache_gib=20")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def shares(plan: dict) -> dict[str, float]:
    return {limit["name"]: limit["share"] for limit in plan["limits"]}


@pytest.mark.parametrize("gpus", [8, 64])
def test_how_many_judges_are_needed_does_not_depend_on_how_many_there_are(gpus):
    needed = {
        planned("--gpus", str(gpus), "--judge-gpus", str(judges))["judge_gpus_needed"] for judges in (16, 57, 442, 4000)
    }
    assert len(needed) == 1


def test_needed_judges_grow_with_their_work_and_not_in_stairs():
    needed = [planned("--answer-tokens", str(tokens))["judge_gpus_needed"] for tokens in range(100, 300, 25)]
    for fewer, more in pairwise(needed):
        assert fewer < more < 1.25 * fewer


def test_where_no_number_of_judges_keeps_up_it_says_which_staleness_does():
    few = ("--gpus", "512", "--judge-gpus", "1000")
    plan = planned(*few, recipe=RECIPE["continual_8b"])
    assert not plan["judges_keep_up"]
    assert plan["times"]["waiting for judges"] > 0
    shown = CliRunner().invoke(app, [*command(RECIPE["continual_8b"]), *few], terminal_width=400).stdout
    assert "no number keeps up" in " ".join(shown.split())
    ahead = planned(*few, "train.staleness=3", recipe=RECIPE["continual_8b"])
    assert ahead["judges_keep_up"]


def test_a_group_alone_takes_its_rounds_after_each_other_whatever_the_staleness():
    fresh = make_plan(plan_request("continual_8b", gpus=64, judges=448))
    config = replace(fresh.request.config, train=replace(fresh.request.config.train, staleness=4))
    ahead = make_plan(replace(fresh.request, config=config))
    assert fresh.judges.shortest == ahead.judges.shortest
    # Seventeen candidates meet in five rounds.
    assert fresh.judges.shortest == pytest.approx(5 * fresh.judges.servers.alone.answer_seconds)


def test_too_few_workers_hold_up_servers_that_would_do():
    recipe = RECIPE["continual_8b"]
    judges = ("--judge-gpus", "448", "teacher.generative.quality.order=random")
    enough = planned(*judges, recipe=recipe)
    needed = enough["judge_workers_needed"]
    assert enough["times"]["waiting for judges"] == 0
    assert 16 < needed < 128
    assert planned(*judges, "--judge-workers", str(needed), recipe=recipe)["times"]["waiting for judges"] == 0
    few = planned(*judges, "--judge-workers", "8", recipe=recipe)
    assert few["times"]["waiting for judges"] > 20
    assert shares(few)["judge workers"] == needed / 8
    # 64 groups of 1,024 concurrently, each with its rounds: the servers have nothing else to do.
    assert few["judge_seconds"] == pytest.approx(1024 / 64 * few["judge_group_seconds"]["alone"], rel=0.05)


def test_a_worker_has_as_many_requests_at_a_server_as_the_launcher_allows():
    assert ServedTeacher().concurrency == WORKER_CONCURRENCY
    one = make_plan(replace(plan_request("continual_1b4", gpus=8, judges=1), judge_workers=1))
    many = make_plan(replace(plan_request("continual_1b4", gpus=8, judges=1), judge_workers=32))
    # Eight groups have 72 requests open, of which 32 are at the server.
    assert one.judges.judging.server_seconds > 1.2 * many.judges.judging.server_seconds


def test_a_group_that_cannot_be_judged_before_its_deadline_stops_the_run():
    hard = (
        "teacher.generative.quality.scheme=round_robin",
        "teacher.generative.quality.votes=20",
        "teacher.generative.quality.order=both",
    )
    plan = planned(*hard, "--judge-workers", "48", exit_code=1)
    assert not plan["runs"]
    assert shares(plan)["deadline of a group"] > 1
    # Servers are full with a few groups: fewer workers are as fast, and each group is sooner done.
    fewer = planned(*hard)
    assert fewer["runs"]
    assert fewer["judge_seconds"] == pytest.approx(plan["judge_seconds"], rel=0.05)


def test_a_teacher_in_the_trainer_answers_on_leaders_only():
    """One per replica: with tensor parallelism there are half as many."""
    whole = planned(*IN_TRAINER)
    halved = planned(*IN_TRAINER, "parallel.tensor=2", "parallel.sequence=true")
    assert halved["judge_seconds"] == pytest.approx(2 * whole["judge_seconds"], rel=0.1)
    assert whole["times"]["waiting for judges"] == whole["judge_seconds"]


def test_a_teacher_in_the_trainer_takes_its_memory():
    served, inside = planned("train.staleness=0"), planned(*IN_TRAINER)
    weights = 2 * 8.03e9
    assert inside["memory"]["teacher"] == pytest.approx(weights + 20 * 2**30, rel=0.01)
    assert inside["memory"]["total"] - served["memory"]["total"] == inside["memory"]["teacher"]
    likelihood = planned(*IN_TRAINER, "teacher.judge=likelihood")
    assert likelihood["memory"]["teacher"] == pytest.approx(weights, rel=0.01)
    large = ("--teacher", "configs/models/llama-70b.json")
    assert not planned(*IN_TRAINER, *large, exit_code=1)["runs"]


def test_prompts_have_to_fit_the_teachers_context_wherever_it_is():
    for place in ((), IN_TRAINER):
        plan = planned(*place, "teacher.max_context=2048", exit_code=1)
        assert shares(plan)["context of the teacher"] > 1, place
