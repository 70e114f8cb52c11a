"""The GPU script without its parts: figures, output, and how it runs parts within a budget."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "gpu"
sys.path.insert(0, str(SCRIPTS))

import check_gpu  # noqa: E402
import gpu_figures  # noqa: E402
import gpu_runner  # noqa: E402
from gpu_figures import FAIL, PASS, SIZES, SKIPPED, Row  # noqa: E402
from gpu_runner import Part  # noqa: E402


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
    size = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
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
        # The first step is measured, not judged.
        ([11.0, 9.1, 8.1], [2.0, 0.9, 1.0], FALLING, PASS, "from step 2 on"),
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


@pytest.mark.parametrize(("measured", "result"), [(110, PASS), (81, PASS), (121, FAIL), (79, FAIL)])
def test_memory_passes_if_the_planner_is_close(measured, result):
    assert gpu_figures.judge_memory(measured * 2**30, 100 * 2**30)[0] == result


def test_the_model_of_1_4_billion_weights_is_that_of_the_recipes():
    shape = json.loads((SCRIPTS.parents[1] / "configs/models/llama-1.4b.json").read_text())
    assert {name: SIZES["1.4b"][name] for name in shape.keys() & SIZES["1.4b"].keys()} == {
        name: shape[name] for name in shape.keys() & SIZES["1.4b"].keys()
    }
    assert {"hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"} <= shape.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "1"], "--steps is 1"),
        (["--rows", "6", "--micro-batch", "4"], "--rows is 6 and --micro-batch 4"),
        (["--rows", "3", "--micro-batch", "1"], "--rows is 3"),
        (["--sequence", "8"], "--sequence is 8"),
        (["--budget", "0"], "--budget is 0"),
        (["--only", "nonsense"], "nonsense"),
        (["--size", "9b"], "9b"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        check_gpu.parse_arguments(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_parts_come_in_order_of_their_value_and_have_a_function():
    options = check_gpu.parse_arguments([])
    assert options.only == [part.name for part in check_gpu.PARTS]
    assert options.only[:6] == ["update", "dpo", "rollouts", "offload", "ipc", "resume"]
    for part in check_gpu.PARTS:
        module, function = part.function.split(":")
        assert re.search(rf"^(def {function}\(|{function} = partial)", (SCRIPTS / f"{module}.py").read_text(), re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "check_gpu.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "check_gpu.py needs a GPU, and torch finds no CUDA device here; --rehearse runs every part on the CPU"
    ]
    assert done.stdout == ""


PREAMBLE = f"""
import faulthandler, os, subprocess, sys, time
faulthandler.enable()
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from gpu_figures import PASS, Row
from gpu_runner import append_row
folder, name = Path(sys.argv[1]), sys.argv[2]
def row(check): append_row(folder, name, Row(check, PASS, "", "", {{"n": 1.0}}))
def hang(*arguments, **named):
    Path(folder, f"{{name}}.hangs").touch()
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run parts that are scripts: name -> code."""
    monkeypatch.setattr(gpu_runner, "PACKAGES", ("json",))

    def run_scripts(scripts, budget, **changes):
        parts = [Part(name, "", changes.get(name, 1.0)) for name in scripts]

        def command(part):
            return [sys.executable, "-c", PREAMBLE + scripts[part.name], str(tmp_path), part.name]

        def start(command, output):
            """Start a script; the seconds of one that hangs count from there, however slowly Python starts."""
            process = gpu_runner.start_process(command, output)
            while "hang" in command[2].removeprefix(PREAMBLE) and process.poll() is None:
                if (tmp_path / f"{command[-1]}.hangs").exists():
                    break
                time.sleep(0.01)
            return process

        return gpu_runner.run_parts(parts, budget, tmp_path, command, start=start)

    return run_scripts


def test_a_part_that_fails_keeps_what_it_measured_and_affects_no_other(run, capsys):
    rows = run({"a": "row('first'); print('details'); raise ValueError('no such kernel')", "b": "row('second')"}, 60)
    assert [(row.check, row.result) for row in rows] == [("first", PASS), ("a", FAIL), ("second", PASS)]
    assert rows[1].why == "ValueError: no such kernel"
    assert rows[0].figures == {"n": 1.0}
    assert "details" in capsys.readouterr().err


def test_a_part_that_dies_without_a_word_is_a_failure(run):
    (row,) = run({"a": "os._exit(7)"}, 60)
    assert (row.result, row.why) == (FAIL, "exit code 7")


def test_a_part_past_its_share_is_ended_with_what_it_started_and_others_go_on(run, tmp_path):
    hangs = f"""row('first')
child = subprocess.Popen(['sleep', '60'])
Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
hang()
"""
    began = time.monotonic()
    rows = run({"a": hangs, "b": "row('second')"}, 59, b=58.0)
    assert time.monotonic() - began < 59
    assert [(row.check, row.result) for row in rows] == [("first", PASS), ("a", FAIL), ("second", PASS)]
    assert rows[1].why.startswith("ended after 1 s, its share of --budget")
    child = Path("/proc", (tmp_path / "child").read_text(), "status")
    assert not child.exists() or "zombie" in child.read_text()


def test_where_a_part_was_that_is_ended(run, tmp_path):
    code = "import gpu_figures; gpu_figures.write_json(Path('/proc/self/fd/0'), {})"
    row, _ = run({"a": f"import gpu_figures; gpu_figures.json.dumps = hang\n{code}", "b": "row('second')"}, 59, b=58.0)
    assert re.search(r"its share of --budget, in \"tests/gpu/gpu_figures\.py\", line \d+ in write_json$", row.why), row


def test_seconds_that_a_part_leaves_go_to_the_next_and_skipped_parts_need_none(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_runner, "PACKAGES", ())
    given = {}

    class Done:
        pid = 2**22 + 1  # of no process

        def __init__(self, name):
            self.name = name

        def wait(self, timeout=None):
            given[self.name] = timeout
            return 0

    parts = [Part("a", "", 1.0), Part("b", "", 8.0, ("no_such_module",)), Part("c", "", 1.0), Part("d", "", 2.0)]
    rows = gpu_runner.run_parts(parts, 100, tmp_path, lambda part: [part.name], start=lambda one, _: Done(one[0]))
    assert [(row.check, row.result, row.why) for row in rows] == [("b", SKIPPED, "not installed here: no_such_module")]
    assert given == pytest.approx({"a": 25.0, "c": 100 / 3, "d": 100.0}, abs=1.0)


def test_what_does_not_fit_into_the_budget_and_what_needs_a_gpu_is_skipped_with_the_reason(run, monkeypatch, tmp_path):
    rows = run({"a": "time.sleep(60)", "b": "row('second')"}, 1.2, a=100.0)
    assert (rows[1].result, rows[1].why) == (SKIPPED, "nothing is left of --budget 1.2")
    part = Part("graphs", "", 1.0, needs_gpu="CUDA graphs need a GPU")
    (row,) = gpu_runner.run_parts([part], 10, tmp_path, lambda part: [], on_cpu=True)
    assert (row.result, row.why) == (SKIPPED, "CUDA graphs need a GPU")


def test_a_package_that_a_part_misses_is_no_failure(tmp_path, monkeypatch):
    options = check_gpu.parse_arguments(["--rehearse"])
    cases = (
        ("import no_such_package", False),
        ("import json.no_such_part", True),
        ("raise ModuleNotFoundError(name='engine_matrix')", True),  # of this repository
    )
    for code, raises in cases:
        (tmp_path / "gpu_absent.py").write_text(code)
        monkeypatch.setattr(check_gpu, "PARTS", (Part("absent", "gpu_absent:run", 1.0),))
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("gpu_absent", None)
        if raises:
            with pytest.raises(ModuleNotFoundError):
                check_gpu.run_here(options, "absent", tmp_path)
        else:
            check_gpu.run_here(options, "absent", tmp_path)
    (line,) = gpu_runner.rows_file(tmp_path, "absent").read_text().splitlines()
    assert json.loads(line)["why"] == "not installed here: no_such_package"
