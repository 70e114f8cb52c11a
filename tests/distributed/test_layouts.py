"""Every layout gives the losses, gradients and weights of one process. Real processes over gloo."""

from __future__ import annotations

import functools

import pytest
import torch
from layout_runs import Case, save_model, train_all
from safetensors.torch import load_file
from worlds import run_world

from megatron_rlpt.config import Dtype, Recompute

LAYOUTS: dict[int, list[Case]] = {
    2: [
        Case(layout={"tensor": 2}),
        Case(layout={"tensor": 2, "sequence": True}),
        Case(layout={"pipeline": 2}),
        Case(layout={"pipeline": 2, "virtual_stages": 2}),
        Case(layout={"context": 2}),
        Case(),
        Case(layout={"overlap": True}),
        Case(examples=7),
        Case(examples=1),
        Case("llama-untied", {"tensor": 2}),
        Case("llama-untied", {"pipeline": 2}),
        Case("qwen2", {"tensor": 2}),
        Case("qwen3", {"tensor": 2}),
        Case("qwen3", {"tensor": 2, "sequence": True}),
        Case("qwen3_moe", {"expert": 2}),
        Case("qwen3_moe", {"pipeline": 2}),
        Case("qwen3_moe", {"tensor": 2, "sequence": True}),
        Case("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2}),
        Case("qwen3_moe"),
        Case("mixtral", {"expert": 2}),
        Case("mixtral", {"tensor": 2, "sequence": True, "expert": 2}),
        Case("qwen3_moe", {"expert": 2}, routing=True),
        Case("qwen3_moe", {"tensor": 2, "sequence": True}, routing=True),
        Case("qwen3_moe", {"pipeline": 2, "virtual_stages": 2}, recompute=Recompute.mlp, routing=True),
        Case("qwen3_moe", {"pipeline": 2}, recompute=Recompute.full, routing=True),
        Case("qwen3_moe", {"context": 2}, routing=True),
        Case("mixtral", routing=True),
        Case(layout={"tensor": 2}, recompute=Recompute.full),
        Case(layout={"pipeline": 2}, recompute=Recompute.selective),
        Case(layout={"tensor": 2}, recompute=Recompute.mlp),
        Case("qwen3_moe", {"expert": 2}, recompute=Recompute.mlp),
        Case(layout={"tensor": 2}, objective="dr_grpo"),
        Case(layout={"pipeline": 2}, objective="dr_grpo"),
        Case(layout={"context": 2}, objective="dr_grpo"),
        Case(objective="grpo"),
        Case(layout={"context": 2}, objective="rf_nll"),
        Case(layout={"tensor": 2}, dtype=Dtype.bf16),
        Case(layout={"pipeline": 2}, dtype=Dtype.bf16),
    ],
    4: [
        Case("llama-untied", {"tensor": 2, "pipeline": 2}),
        Case(layout={"tensor": 2, "pipeline": 2, "virtual_stages": 2, "sequence": True}),
        Case(layout={"tensor": 2, "context": 2, "sequence": True}),
        Case(layout={"pipeline": 2, "overlap": True}),
        Case(layout={"tensor": 2}),
        Case(layout={"pipeline": 4}),
        Case("qwen3_moe", {"expert": 2, "pipeline": 2}),
        Case("qwen3_moe", {"expert": 4, "context": 2}),
    ],
    8: [
        Case("llama-untied", {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}),
        Case("qwen3_moe", {"tensor": 2, "pipeline": 2, "expert": 4, "sequence": True}),
        Case("mixtral", {"tensor": 2, "pipeline": 2, "expert": 2, "sequence": True}, routing=True),
    ],
}
CASES = [pytest.param(world, case, id=f"{world}-{case}") for world, cases in LAYOUTS.items() for case in cases]
PER_WORLD = 5
"""Cases that the processes of a world run. The groups of each leave 60 threads that wake up a hundred times a second:
after 20 cases they need more processor time than a case."""
LOOSER = {Dtype.fp32: 1.0, Dtype.bf16: 2.0**13}
"""bf16 has 16 fewer bits of mantissa than fp32, and reordered sums differ by nearly that factor more."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    kinds = {case.model for cases in LAYOUTS.values() for case in cases}
    return {kind: str(save_model(base / kind, kind)) for kind in sorted(kinds)}


@pytest.fixture(scope="module")
def runs_of(folders):
    """Return the results of all cases of a world, by rank."""

    @functools.cache
    def run(world: int):
        cases = LAYOUTS.get(world) or sorted({case.alone for own in LAYOUTS.values() for case in own}, key=str)
        results = [{} for _ in range(world)]
        for first in range(0, len(cases), PER_WORLD):
            part = cases[first : first + PER_WORLD]
            found = run_world(world, train_all, part, folders, limit=560, start_group=False)
            for whole, one in zip(results, found, strict=True):
                whole |= one
        return results

    return run


@pytest.fixture
def ranks(runs_of, world, case):
    """Results of every rank of the world."""
    return [results[case] for results in runs_of(world)]


@pytest.fixture
def alone(runs_of, case):
    """Results of one process."""
    return runs_of(1)[0][case.alone]


@pytest.mark.parametrize(("world", "case"), CASES)
def test_a_layout_computes_what_one_process_computes(ranks, alone, folders, case, subtests):
    with subtests.test("losses and gradients are those of one process"):
        check_losses(ranks, alone, case)
    with subtests.test("weights before the update are the folder's bit for bit, in its names and shapes"):
        check_export(ranks, folders, case)
    with subtests.test("weights after the updates are those of one process, on every rank"):
        check_update(ranks, alone, folders, case)


def check_losses(ranks, alone, case):
    looser = LOOSER[case.dtype]
    for ours, theirs in zip(ranks[0]["figures"], alone["figures"], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5 * looser)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4 * looser)
        assert ours["logprob_gap"] == pytest.approx(theirs["logprob_gap"], rel=1e-5 * looser)
        for name in [name for name in theirs if name.startswith(("router/", "grpo/"))]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4 * looser, abs=1e-7), name
        assert ours["tokens"] == theirs["tokens"] == theirs["executed_tokens"]
        if not {"context", "expert"} & case.layout.keys():
            assert ours["executed_tokens"] <= 1.1 * ours["tokens"]
    assert ranks[0]["figures"][0]["grad_norm"] > 1e-3
    if case.objective == "dr_grpo":
        assert ranks[0]["figures"][1]["grpo/reference_kl"] > 1e-4, "the reference has no say"
    if case.routing:
        assert 0.5 < ranks[0]["figures"][0]["router/replayed"] < 1
        assert ranks[0]["figures"][0]["router/replay_changed"] > 0.5
    assert (ranks[0]["logprobs"] - alone["logprobs"]).abs().max() < 1e-5 * looser


def check_export(ranks, folders, case):
    folder = load_file(f"{folders[case.model]}/model.safetensors")
    for rank in ranks:
        assert rank["before"].keys() == folder.keys()
        for name, weight in rank["before"].items():
            assert torch.equal(weight, folder[name].to(weight.dtype)), name


def check_update(ranks, alone, folders, case):
    folder = load_file(f"{folders[case.model]}/model.safetensors")
    for name, expected in alone["after"].items():
        moved = (expected - folder[name]).abs().max()
        assert moved > 0, name
        if case.dtype is Dtype.fp32:
            assert (ranks[0]["after"][name] - expected).abs().max() < 1e-4, name
        for rank in ranks[1:]:
            assert torch.equal(rank["after"][name], ranks[0]["after"][name]), name
            assert rank["figures"] == ranks[0]["figures"]
