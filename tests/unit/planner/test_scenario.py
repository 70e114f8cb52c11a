"""Simulated plans: the same step time as planned, and results for the whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import RECIPES, ROOT, planned
from plan_requests import plan_request

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.planner.hardware import GPUS, Nodes
from megatron_rlpt.planner.plan import make_plan
from megatron_rlpt.planner.simulation.scenario import FaultModel, Scenario, simulate_plan
from megatron_rlpt.planner.simulation.setting import Failures, Rollouts, Service, SimulatedCluster, Workload
from megatron_rlpt.planner.simulation.simulate import simulate

SHORT = ("train.steps=24", "optimizer.warmup_steps=1")
CALM = FaultModel(node_failures=0.0)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_simulated_step_is_as_long_as_the_planned_one(recipe):
    plan = planned(*SHORT, "--simulate", "--node-failures", "0", "checkpoint.every=1000", recipe=recipe)
    assert plan["simulation"]["step_seconds"] == pytest.approx(plan["step_seconds"], rel=0.04)
    assert 0 < plan["simulation"]["variation"] < 0.25


@pytest.mark.parametrize("judges", [10, 16])
def test_they_agree_as_well_where_judges_do_not_keep_up(judges):
    plan = make_plan(plan_request("continual_1b4", gpus=8, judges=judges))
    assert plan.waiting > 0.2 * plan.step_seconds
    found = simulate_plan(plan, CALM, steps=24)
    assert found.result.step_seconds == pytest.approx(plan.step_seconds, rel=0.05)
    assert found.result.bottleneck == "judging"


def test_the_last_group_of_a_batch_is_waited_for_though_servers_have_time():
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "continual_70b")
    plan = planned(*SHORT, "--judge-gpus", "240", "--simulate", "--node-failures", "0", recipe=recipe)
    assert plan["times"]["waiting for judges"] > 2
    # The plan waits for the slowest group of every batch, and is a little too careful.
    assert plan["simulation"]["step_seconds"] == pytest.approx(plan["step_seconds"], rel=0.08)
    assert plan["simulation"]["step_seconds"] < plan["step_seconds"]


def test_and_where_workers_are_too_few():
    plan = make_plan(replace(plan_request("continual_1b4", gpus=8, judges=56), judge_workers=4))
    found = simulate_plan(plan, CALM, steps=24)
    assert plan.waiting > 0
    assert found.result.step_seconds == pytest.approx(plan.step_seconds, rel=0.08)


def test_work_on_many_answers_varies_less_than_one_answer():
    plan = make_plan(plan_request("continual_1b4", gpus=8, judges=56))
    # 45 answers of equal length on average.
    assert plan.judges.servers.variation == pytest.approx(0.5 / 45**0.5)


def test_groups_that_are_given_up_fail_the_run():
    plan = planned(
        *SHORT,
        "--simulate",
        "teacher.workers.group_deadline=60",
        "--slow-judges",
        "0.9",
        "--slowdown",
        "100",
        exit_code=1,
    )
    assert plan["runs"]
    assert plan["simulation"]["fails"]
    assert plan["simulation"]["given_up_share"] > 0.2


def test_nodes_fail_by_eight_gpus_however_many_nvlink_connects():
    given = plan_request("continual_1b4", gpus=8, judges=56)
    gpu = GPUS["gb200"]
    found = [
        simulate_plan(make_plan(replace(given, trainer=Nodes(gpu, 64, domain))), CALM, steps=8).failures.nodes
        for domain in (8, 64)
    ]
    assert found == [8, 8]


def test_a_checkpoint_in_the_background_costs_part_of_one_that_is_waited_for():
    given = plan_request("continual_1b4", gpus=8, judges=56)

    def seconds(background: bool) -> float:
        checkpoint = replace(given.config.checkpoint, background=background, every=1)
        plan = make_plan(replace(given, config=replace(given.config, checkpoint=checkpoint)))
        result = simulate_plan(plan, CALM, steps=8).result
        return result.stage_seconds["checkpoint"]

    assert seconds(True) == pytest.approx(2 / 7 * seconds(False))
    assert seconds(False) > 1


def test_the_whole_run_is_as_long_as_one_that_is_simulated_to_its_end():
    rollouts = Rollouts(per_episode=1, tokens=1, tokens_per_second=1e9)
    failures = Failures(nodes=10, per_node_hour=0.5, restart=30.0)
    step = Workload(1, 1, 0, Service(8.0), checkpoint=2.0, checkpoint_every=10)
    part = simulate(SimulatedCluster(rollouts, None), step, 100)
    cost = 30.0 + 10 * part.step_seconds / 2
    scenario = Scenario(part, 100, 20_000, 100, cost, failures, 0.0, 8.0, 0.2, 10, 2.0)
    whole = simulate(SimulatedCluster(rollouts, None, failures), step, 20_000)
    assert scenario.seconds == pytest.approx(whole.seconds, rel=0.03)
    assert scenario.expected_failures == pytest.approx(whole.failures, rel=0.2)
    assert scenario.seconds > 1.08 * scenario.calm_seconds


def test_as_many_steps_are_simulated_as_staleness_asks_for():
    given = plan_request("continual_1b4", gpus=8, judges=56)
    ahead = replace(given, config=replace(given.config, train=replace(given.config.train, staleness=4)))
    assert simulate_plan(make_plan(ahead), CALM, steps=4).steps == 12
    short = replace(ahead.config, train=replace(ahead.config.train, steps=10))
    with pytest.raises(ConfigError, match=r"train\.steps is 10; --simulate needs at least 12"):
        simulate_plan(make_plan(replace(ahead, config=short)), CALM)
