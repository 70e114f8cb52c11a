"""Plans of runs whose judge and rewriter are two models."""

from __future__ import annotations

import pytest
from plan_cases import RECIPES, ROOT, planned

RECIPE = next(recipe for recipe in RECIPES if recipe.stem == "continual_1b4")
REWRITES = ("candidates.rewrite=true",)
OWN = (*REWRITES, "teacher.rewriter.path=/models/own")
LARGE = ("--rewriter", "configs/models/llama-70b.json", "--rewriter-gpus", "64")
SMALL = ("--rewriter", "configs/models/llama-1.4b.json", "--rewriter-gpus", "8")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def shares(plan: dict) -> dict[str, float]:
    return {limit["name"]: limit["share"] for limit in plan["limits"]}


def test_each_model_needs_gpus_for_its_own_calls():
    shared = planned(*REWRITES)
    apart = planned(*OWN, "--rewriter", "configs/models/llama-8b.json", "--rewriter-fp8", "--rewriter-gpus", "8")
    judging = planned()
    assert shared["rewriter_gpus_needed"] == 0
    assert 0 < apart["rewriter_gpus_needed"] < 8
    # One rewrite beside many comparisons: the servers of both together are about those of one model in both roles.
    together = apart["judge_gpus_needed"] + apart["rewriter_gpus_needed"]
    assert together == pytest.approx(shared["judge_gpus_needed"], abs=2)
    assert judging["judge_gpus_needed"] < apart["judge_gpus_needed"], "the rewrite is judged as well"
    names = {call["name"] for call in apart["judge_calls"]}
    assert names == {call["name"] for call in shared["judge_calls"]} >= {"rewrite", "quality"}


def test_a_larger_rewriter_needs_more_and_the_judge_the_same():
    small, large = planned(*OWN, *SMALL), planned(*OWN, *LARGE)
    assert small["judge_gpus_needed"] == large["judge_gpus_needed"]
    assert large["rewriter_gpus_needed"] > 4 * small["rewriter_gpus_needed"]
    assert large["gpu_hours"]["judges"] > small["gpu_hours"]["judges"], "GPUs of both count"
    assert {"servers of the judge", "servers of the rewriter", "GPU memory of the rewriter's servers"} <= set(
        shares(large)
    )


def test_too_few_servers_of_the_rewriter_hold_up_the_run_whatever_the_judges():
    few = planned(*OWN, "--rewriter", "configs/models/llama-70b.json", "--rewriter-gpus", "8", "--judge-gpus", "4000")
    assert shares(few)["servers of the rewriter"] > 1
    assert few["times"]["waiting for judges"] > 0


def test_in_the_trainer_the_weights_of_both_are_on_its_gpus():
    inside = ("teacher.run_in=trainer", "train.staleness=0", "teacher.kv_cache_gib=4")
    one, two = planned(*REWRITES, *inside), planned(*OWN, *inside, *SMALL[:2])
    assert two["memory"]["teacher"] - one["memory"]["teacher"] == pytest.approx(2 * 1.5e9 + 4 * 2**30, rel=0.1)
    same_size = planned(*OWN, *inside, "--rewriter", "configs/models/llama-8b.json")
    assert two["judge_seconds"] < same_size["judge_seconds"], "a small model rewrites faster"


def test_the_context_of_each_model_is_checked():
    plan = planned(*OWN, *SMALL, "teacher.rewriter.max_context=1000", exit_code=1)
    assert shares(plan)["context of the rewriter"] > 1
    assert shares(plan)["context of the judge"] < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*REWRITES, *SMALL), "--rewriter is configs/models/llama-1.4b.json, but the run's rewriter has no model of"),
        (("--rewriter-gpus", "8"), "--rewriter-gpus is 8, but the run's rewriter has no model of its own"),
        ((*OWN, *SMALL[:2]), "--rewriter-gpus is 0, but one server of the rewriter takes 1"),
        ((*OWN, *SMALL, "--rewriter-tensor", "3"), "--rewriter-tensor is 3, which does not divide the rewriter's"),
        ((*OWN, "--rewriter-gpus", "8"), "model folder /models/own does not exist; give a config.json with --rewriter"),
    ],
)
def test_options_about_the_rewriter_that_cannot_be_planned_are_named(rlpt, arguments, said):
    code, out, err = rlpt(
        *("plan", "--config", RECIPE, "--gpus", "8", "--model", "configs/models/llama-1.4b.json"),
        *("--teacher", "configs/models/llama-8b.json", "--judge-gpus", "56", *arguments),
    )
    assert (code, out) == (2, "") or "does not exist" in said
    assert said in err
    assert len(err.strip().splitlines()) == 1
