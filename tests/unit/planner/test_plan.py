"""``rlpt plan``: its answers, and how they change with the settings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from plan_cases import RECIPES, ROOT, command, planned
from plan_requests import plan_request
from typer.testing import CliRunner

from megatron_rlpt.cli.main import app
from megatron_rlpt.config import OptionOrder, PairScheme
from megatron_rlpt.errors import ConfigError, EngineError, ModelError
from megatron_rlpt.planner.hardware import GPUS
from megatron_rlpt.planner.plan import make_plan
from megatron_rlpt.planner.report import to_json
from megatron_rlpt.planner.simulation.scenario import FaultModel, simulate_plan
from megatron_rlpt.planner.simulation.setting import Failures
from megatron_rlpt.planner.sweep import split, sweep
from megatron_rlpt.teacher.comparisons import comparisons

BLOCKED = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "vllm", "transformers", "numpy", "redis", "httpx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
from megatron_rlpt.cli.main import main
sys.argv = ["rlpt", *sys.argv[1:]]
main()
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def refused(*arguments: str):
    return CliRunner().invoke(app, [*command(RECIPES[0]), *arguments]).exception


def test_planning_needs_neither_torch_nor_numpy(tmp_path):
    page = tmp_path / "plan.html"
    run = [sys.executable, "-c", BLOCKED, *command(RECIPES[0]), "--html", str(page)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "What fails first" in done.stdout
    text = page.read_text()
    assert "http://" not in text, "the page needs nothing else"
    assert "https://" not in text
    for heading in ("Memory of the fullest rank", "Judging", "Constants and their sources"):
        assert heading in text


def test_the_parts_of_a_step_add_up_and_judges_are_asked_what_the_scheme_asks():
    plan = planned()
    assert plan["step_seconds"] == pytest.approx(sum(plan["times"].values()))
    assert plan["memory"]["total"] >= plan["memory"]["weights"] + plan["memory"]["gradients"] > 0
    (quality,) = plan["judge_calls"]
    assert quality["count"] == comparisons(PairScheme.tournament, 17, 1, OptionOrder.random)
    assert 1920 < quality["shared"] < 1920 + 60
    assert 2 * 128 < quality["own"] < 2 * 128 + 60
    assert quality["instructions"] > 300
    assert quality["answer"] == 150
    assert plan["hours"] == pytest.approx(2000 * plan["step_seconds"] / 3600)


def test_brief_prompts_have_no_instructions_to_count():
    offered = (
        "candidates.rewrite=true",
        "teacher.generative.safety.weight=1",
        "teacher.generative.factuality.weight=1",
    )
    full = {call["name"]: call for call in planned(*offered)["judge_calls"]}
    brief = {
        call["name"]: call
        for call in planned(*offered, "teacher.generative.prompt=brief", "teacher.rewriter.prompt=brief")["judge_calls"]
    }
    texts = {"rewrite": 1920 + 128, "quality": 1920 + 2 * 128, "safety": 128, "factuality": 1920 + 2 * 128}
    for name, tokens in texts.items():
        assert brief[name]["instructions"] == 0
        assert full[name]["instructions"] > 200
        assert tokens + 8 < brief[name]["shared"] + brief[name]["own"] < tokens + 30
        assert brief[name]["count"] == full[name]["count"]


def test_too_few_judges_hold_up_the_trainer_and_as_many_as_are_needed_do_not():
    needed = planned()["judge_gpus_needed"]
    few = planned("--judge-gpus", str(needed // 2))
    assert few["times"]["waiting for judges"] > 0
    assert {limit["name"]: limit["share"] for limit in few["limits"]}["judges"] > 1
    assert planned("--judge-gpus", str(needed))["times"]["waiting for judges"] == 0
    assert planned("--judge-gpus", str(needed - 1))["times"]["waiting for judges"] > 0


def test_more_votes_longer_answers_and_full_precision_need_more_judges():
    least = planned()["judge_gpus_needed"]
    assert planned("--answer-tokens", "400")["judge_gpus_needed"] > least
    assert planned("teacher.generative.quality.votes=3", "--judge-gpus", "200")["judge_gpus_needed"] > 2 * least
    exact = [argument for argument in command(RECIPES[0]) if argument != "--judge-fp8"]
    in_bf16 = CliRunner().invoke(app, [*exact, "--judge-gpus", "200", "--json"])
    assert json.loads(in_bf16.stdout)["judge_gpus_needed"] > least


def test_a_step_that_is_shorter_than_a_judgment_needs_more_staleness():
    """For any number of judges: a batch must be judged within the steps that it is ahead."""
    quick = ("--gpus", "64", "--judge-gpus", "2000")
    fresh = planned(*quick)
    assert fresh["times"]["waiting for judges"] > 0
    assert fresh["limits"][0]["name"] == "time to judge a group"
    ahead = planned(*quick, "train.staleness=8")
    assert ahead["times"]["waiting for judges"] == 0


def test_a_run_that_does_not_fit_says_so_and_leaves_with_1():
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "continual_8b")
    plan = planned("rollout.kv_cache_gib=60", recipe=recipe, exit_code=1)
    assert not plan["runs"]
    assert plan["limits"][0]["name"] == "GPU memory of the trainer"
    assert plan["limits"][0]["share"] > 1


def test_all_layouts_are_ranked_and_the_best_is_no_slower_than_the_given_one():

    given = plan_request("continual_8b", gpus=64, judges=448)
    found = sweep(given)
    steps = [plan.step_seconds for plan in found.plans]
    assert steps == sorted(steps)
    assert found.tried == found.refused + found.too_large + len(found.plans)
    assert steps[0] <= make_plan(given).step_seconds
    assert all(plan.runs for plan in found.plans)


def test_divisions_of_the_gpus_are_ranked_by_cost():

    plans = split(plan_request("continual_1b4", gpus=8, judges=56), 64)
    assert [plan.cost for plan in plans] == sorted(plan.cost for plan in plans)
    assert {plan.request.trainer.gpus + plan.request.judges.gpus for plan in plans} == {64}


def test_slow_judges_hold_up_the_simulated_run():

    plan = make_plan(plan_request("continual_8b", gpus=64, judges=232))
    slow = simulate_plan(plan, FaultModel(slow_share=0.5, slowdown=10.0, node_failures=0.0), steps=16)
    assert slow.result.step_seconds > 1.2 * plan.step_seconds


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--gpu-type", "h1000"), ConfigError, "--gpu-type is 'h1000'; known: a100, h100"),
        (("--judge-gpu-type", "h1000"), ConfigError, "--judge-gpu-type is 'h1000'; known: a100, h100"),
        (("--gpus", "7"), ConfigError, r"it must divide train\.global_batch = 256"),
        (("--judge-gpus", "0"), ConfigError, "--judge-gpus is 0, but one teacher server takes 1"),
        (("--model", "nowhere.json"), ModelError, r"--model nowhere\.json cannot be read"),
        (("parallel.tensor=3",), ConfigError, "parallel.tensor"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(arguments, error, message):
    raised = refused(*arguments)
    assert isinstance(raised, error)
    with pytest.raises(error, match=message):
        raise raised


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teacher.kv_cache_gib=0.1",), r"teacher\.kv_cache_gib is 0\.1, which does not hold one request"),
        (("rollout.kv_cache_gib=0.01",), r"rollout\.kv_cache_gib is 0\.01, which does not hold one sequence of 2048"),
        (("--answer-tokens", "inf"), r"--answer-tokens is inf; allowed: 1 to 512"),
        (("--answer-tokens", "5000"), "--answer-tokens is 5000"),
        (("--node-failures", "inf"), "--node-failures is inf; allowed: finite numbers"),
    ],
)
def test_what_leads_to_no_finite_figure_is_refused_in_a_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        raise refused(*arguments, "--simulate")


def test_the_least_cache_that_a_refusal_names_is_enough():
    needed = str(refused("rollout.kv_cache_gib=0.01")).rsplit(" ", 1)[1]
    assert planned(f"rollout.kv_cache_gib={needed}", "rollout.max_batch=1")["runs"]


def test_a_run_that_gets_nowhere_has_no_number_in_json():
    plan = make_plan(plan_request("continual_1b4", gpus=8, judges=56))
    found = replace(simulate_plan(plan, FaultModel(), steps=8), failures=Failures(1, 100.0, 600.0))
    assert json.loads(to_json(plan, found), parse_constant=pytest.fail)["simulation"]["run_seconds"] is None


@pytest.mark.parametrize(
    ("recipe", "arguments", "error", "message"),
    [
        ("continual_1b4", ("data.max_prefix=8000",), ModelError, "is 8128 tokens; the model allows 4096"),
        (
            "continual_1b4",
            ("--gpu-type", "a100", "model.fp8=delayed"),
            ConfigError,
            "model.fp8 is delayed, which .* not support on a100 GPUs .* allowed: off$",
        ),
        ("continual_1b4", ("model.fp8=mxfp8",), ConfigError, "h100 .* allowed: off, delayed, current, blockwise$"),
        ("continual_1b4", ("model.dtype=fp32",), ConfigError, "model.dtype is fp32"),
        ("continual_1b4", ("--judge-tensor", "3"), ConfigError, "--judge-tensor is 3, .* allowed: 1, 2, 4, 8, 16, 32$"),
        (
            "continual_70b",
            ("optimizer.offload=true", "rollout.engine=megatron", "rollout.tensor=1"),
            ConfigError,
            "never sleeps",
        ),
        (
            "continual_70b",
            ("rollout.tensor=3",),
            ConfigError,
            "rollout.tensor is 3, .*; allowed: 1, 2, 4, 8, 16, 32, 64",
        ),
        ("continual_70b", ("rollout.engine=megatron",), ConfigError, "leave rollout.tensor at 1"),
        ("continual_moe", ("rollout.engine=megatron",), EngineError, "the model is a mixture of experts"),
        ("continual_1b4", ("rollout.router_replay=true",), ConfigError, "has no experts .*router_replay=false$"),
        ("continual_1b4", ("train.router_aux_loss=0.01",), ConfigError, "no experts to balance.*router_aux_loss=0$"),
    ],
)
def test_what_the_trainer_or_a_server_refuses_is_not_planned(recipe, arguments, error, message):
    path = next(known for known in RECIPES if known.stem == recipe)
    raised = CliRunner().invoke(app, [*command(path), *arguments]).exception
    with pytest.raises(error, match=message):
        raise raised


@pytest.mark.parametrize(
    ("name", "mebibytes"), [("a100", 81_920), ("h100", 81_559), ("h200", 143_771), ("b200", 183_359)]
)
def test_memory_is_what_the_driver_reports(name, mebibytes):
    memory = GPUS[name].memory
    assert memory == mebibytes * 2**20
    assert f"{mebibytes:,} MiB" in memory.source


def test_a_mixture_of_experts_is_planned_with_a_warning():
    moe = next(recipe for recipe in RECIPES if recipe.stem == "continual_moe")
    warnings, others = planned(recipe=moe)["warnings"], planned()["warnings"]
    (warning,) = [line for line in warnings if "uncalibrated" in line]
    assert len(warnings) == len(others) + 1
    assert "1.26 to 3.92 times" in warning
    shown = CliRunner().invoke(app, command(moe)).stdout
    assert "warning" in shown
    assert any("planned as bf16" in line for line in others)


def test_balancing_experts_takes_one_more_forward_pass():
    moe = next(recipe for recipe in RECIPES if recipe.stem == "continual_moe")
    plain, balanced = (planned(*more, recipe=moe)["times"] for more in ((), ("train.router_aux_loss=0.01",)))
    assert "counting" not in plain
    assert 0.9 * balanced["reference"] < balanced["counting"] < balanced["reference"], "without the output layer"
    assert balanced["update"] == plain["update"]


def test_grpo_pays_for_a_reference_only_if_it_is_pulled_to_one():
    grpo = ("objective.name=grpo", "candidates.original=false", "candidates.rewrite=false")
    free, pulled = planned(*grpo), planned(*grpo, "objective.kl=0.01")
    assert free["times"]["reference"] == 0
    assert pulled["times"]["reference"] > 0
    assert pulled["times"]["update"] == free["times"]["update"]


def test_times_are_at_the_longest_prefix_unless_a_mean_is_given():
    longest, usual = planned(), planned("--prefix-tokens", "448")
    assert "at the longest prefix (data.max_prefix = 1,920 tokens)" in longest["warnings"][0]
    assert "at prefixes of 448 tokens" in usual["warnings"][0]
    assert usual["trained_tokens"] / longest["trained_tokens"] == pytest.approx((448 + 2 * 128) / (1920 + 2 * 128)), (
        "a pair shares its prefix"
    )
    for part in ("rollouts", "update", "reference"):
        assert usual["times"][part] < longest["times"][part]
    assert sum(calls["shared"] for calls in usual["judge_calls"]) < 1000
    assert usual["cost"] < longest["cost"]
    assert usual["memory"] == longest["memory"], "the longest prefix has to fit all the same"
    with pytest.raises(ConfigError, match=r"--prefix-tokens is 1921; allowed: 1 to data\.max_prefix = 1920"):
        raise refused("--prefix-tokens", "1921")


def test_a_run_that_judges_nothing_needs_no_teacher():
    arguments = command(RECIPES[0])
    place = arguments.index("--teacher")
    del arguments[place : place + 2]
    ntp = ("objective.name=ntp", "candidates.rollouts=0", "--json")
    done = CliRunner().invoke(app, [*arguments, *ntp])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["gpu_hours"]["judges"] == 0
