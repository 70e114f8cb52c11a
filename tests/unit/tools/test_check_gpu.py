"""Computation and output of the GPU script, as far as they need no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "gpu"
sys.path.insert(0, str(SCRIPTS))

import check_gpu  # noqa: E402
import gpu_figures  # noqa: E402
from gpu_figures import FAIL, PASS, SIZES, SKIPPED, Row  # noqa: E402


def test_the_table_has_a_row_per_check_and_no_cell_breaks_it():
    rows = [Row("a", PASS, "1 ms"), Row("b|c", SKIPPED, "", "no\nGPU")]
    lines = gpu_figures.table(rows).splitlines()
    assert lines[0] == "| check | result | measured | |"
    assert lines[2:] == ["| a | PASS | 1 ms |  |", "| b\\|c | SKIPPED |  | no GPU |"]


@pytest.mark.parametrize(("results", "code"), [((PASS, SKIPPED), 0), ((PASS, FAIL), 1), ((), 0)])
def test_only_a_failure_changes_the_exit_code(results, code):
    assert gpu_figures.exit_code([Row("x", result) for result in results]) == code


@pytest.mark.parametrize(
    ("gpu", "fp8", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", False, 989e12),
        ("NVIDIA H100 80GB HBM3", True, 1979e12),
        ("NVIDIA H100 PCIe", False, 756e12),
        ("NVIDIA GB200", False, 2500e12),
        ("NVIDIA A100-SXM4-80GB", True, None),
        ("NVIDIA L40S", False, 362e12),
        ("Some GPU", False, None),
    ],
)
def test_peaks_are_those_of_the_gpu(gpu, fp8, expected):
    assert gpu_figures.peak_flops(gpu, fp8) == expected


def test_flops_are_counted_as_in_the_multiplications_of_a_model():
    size = {"hidden_size": 8, "intermediate_size": 12, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 50}
    weights = 3 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12) + 50 * 8
    # Forward: 2 per weight; scores and mixed values, 2 x 2 x hidden per token seen, half of 10 on average.
    attention = 3 * (2 * 2 * 8 * 10 / 2)
    assert gpu_figures.flops_per_token(size, 10) == 3 * (2 * weights + attention)


def test_mfu_is_the_share_of_the_peak():
    assert gpu_figures.mfu(tokens_per_second=50_000, flops=8e9, peak=1e15) == pytest.approx(0.4)


FALLING = {"loss": [10.0, 9.0, 8.0], "grad_norm": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reference", "result", "why"),
    [
        ([10.0, 9.0, 8.0], [1.0, 1.0, 1.0], None, PASS, ""),
        ([10.1, 9.1, 8.1], [1.1, 0.9, 1.0], FALLING, PASS, "allowed"),
        ([10.0, 9.3, 8.0], [1.0, 1.0, 1.0], FALLING, FAIL, "loss differs from bf16 by up to 3.33%"),
        ([10.0, 9.0, 8.0], [1.0, 1.0, 1.2], FALLING, FAIL, "grad_norm differs"),
        ([10.0, 9.0, 10.0], [1.0, 1.0, 1.0], None, FAIL, "did not fall"),
        ([10.0, float("nan"), 8.0], [1.0, 1.0, 1.0], None, FAIL, "not finite"),
    ],
)
def test_a_run_passes_only_if_it_learns_and_stays_close_to_bf16(loss, grad_norm, reference, result, why):
    found, reason = gpu_figures.judge_training({"loss": loss, "grad_norm": grad_norm}, reference)
    assert found == result
    assert why in reason


@pytest.mark.parametrize(
    "arguments", [["--steps", "1"], ["--rows", "6", "--micro-batch", "4"], ["--only", "nonsense"], ["--size", "9b"]]
)
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        check_gpu.parse_arguments(arguments)
    assert caught.value.code == 2


def test_bf16_runs_before_what_is_held_against_it():
    options = check_gpu.parse_arguments([])
    assert options.only[0] == "bf16"
    assert set(options.only) == {
        "bf16",
        "fp8-delayed",
        "fp8-current",
        "fp8-blockwise",
        "fp8-mxfp8",
        "engine-in-process",
        "engine-ipc",
        "offload",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "check_gpu.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["check_gpu.py needs a GPU, and torch finds no CUDA device here"]
    assert done.stdout == ""


def test_the_random_model_is_one_that_the_policy_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    options = check_gpu.parse_arguments(
        ["--size", "tiny", "--sequence", "24", "--rows", "2", "--micro-batch", "1", "--steps", "3"]
    )
    folder = check_gpu.make_model(tmp_path / "model", SIZES["tiny"], options.sequence)
    series = check_gpu.train(options, folder, "off")
    assert gpu_figures.judge_training(series, None) == (PASS, "")
    # Random weights know nothing: the first loss is that of the uniform distribution.
    assert series["loss"][0] == pytest.approx(9.01, abs=0.3)
