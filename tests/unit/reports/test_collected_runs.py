"""Run folders in every state: finished, in progress, killed, new, damaged, foreign, huge."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from report_cases import write_evaluation, write_run

from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation.results import EVALUATION_FILE
from megatron_rlpt.observe.jsonl import JsonLines
from megatron_rlpt.reports import lines
from megatron_rlpt.reports.collect import RunProgress, collect_run, collect_runs
from megatron_rlpt.reports.curves import POINTS, CurveBuilder, read_training
from megatron_rlpt.reports.samples import LONGEST_TEXT, MOST_SAMPLES, read_samples, shown, shown_row


@pytest.mark.parametrize(
    ("options", "state", "reason"),
    [
        ({}, RunProgress.finished, ""),
        ({"of": 60, "state": "running", "age": 1.0}, RunProgress.running, ""),
        ({"of": 60, "state": "running", "age": 4000.0}, RunProgress.stopped, "killed"),
        ({"of": 60, "state": "loss is nan in step 20"}, RunProgress.stopped, "loss is nan"),
        ({"state": "nothing learnt", "exported": False}, RunProgress.stopped, "nothing learnt"),
        ({"state": "a tracker failed"}, RunProgress.finished, ""),
        ({"steps": 0, "of": 60, "state": "running", "age": 1.0}, RunProgress.running, ""),
    ],
)
def test_the_state_of_a_run(tmp_path, options, state, reason):
    run = collect_run(write_run(tmp_path / "run", **{"steps": 20, **options}))
    assert run.is_run
    assert run.state is state
    assert reason in run.reason
    assert bool(run.reason) == bool(reason)


def test_curves_are_those_of_the_metrics(tmp_path):
    found = read_training(write_run(tmp_path / "run", steps=30))
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert found.steps == 30
    assert found.curves["loss"].mean == pytest.approx([one["loss"] for one in metrics])
    assert found.curves["evaluation/judge/quality"].steps == (9, 19, 29)
    assert found.curves["grad_norm"].steps == tuple(step for step in range(30) if step != 3)  # nan is no value
    assert found.stages["generate"] == pytest.approx(sum(one["seconds/generate"] for one in metrics) / 30)
    assert not {"time", "version", "step", "nonfinite"} & found.curves.keys()
    assert "total" not in found.stages


def test_a_stage_that_runs_rarely_costs_less_per_step(tmp_path):
    with_checkpoint = JsonLines(tmp_path / "metrics.jsonl", 0)
    for step in range(20):
        with_checkpoint.write({"step": step, "seconds/update": 2.0} | ({"seconds/save": 5.0} if step % 10 == 9 else {}))
    assert read_training(tmp_path).stages == {"update": 2.0, "save": 0.5}


def test_half_and_foreign_lines_are_left_out_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 1.0}\nnonsense \xff\n[1]\n\n{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    found = read_training(tmp_path)
    assert found.curves["loss"].mean == (1.0, 3.0)
    assert found.notes == ("2 lines of metrics.jsonl left out: not a JSON object with a step.",)


def test_a_step_that_is_written_again_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in
                            ((0, 1.0), (1, 2.0), (2, 3.0), (1, 7.0), (2, 8.0), (3, 9.0))))  # fmt: skip
    assert read_training(tmp_path).curves["loss"].mean == (1.0, 7.0, 8.0, 9.0)


def test_a_long_curve_is_averaged_over_equal_blocks():
    builder = CurveBuilder()
    steps = 10 * POINTS + 7
    for step in range(steps):
        builder.add(step, float(step % 16))
    curve = builder.curve()
    assert curve.averaged == 16
    assert len(curve.mean) <= POINTS
    assert set(curve.mean[:-1]) == {7.5}
    assert (curve.low[0], curve.high[0]) == (0.0, 15.0)
    assert curve.steps[1] == pytest.approx(16 + 7.5)
    assert curve.total == pytest.approx(sum(step % 16 for step in range(steps)))


def write_samples(folder, steps, per_step=1, text="word " * 20):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("w") as out:
        for step in range(steps):
            for number in range(per_step):
                candidate = {"source": "rollout", "text": text, "value": 1.0}
                row = {"step": step, "episode": f"{step}-{number}", "prefix": text, "candidates": [candidate]}
                out.write(json.dumps(row) + "\n")


def test_samples_of_a_long_run_are_spread_evenly_and_meet_those_of_other_runs(tmp_path):
    write_samples(tmp_path / "long", 5000)
    write_samples(tmp_path / "short", 700)
    long, short = read_samples(tmp_path / "long"), read_samples(tmp_path / "short")
    steps = [row["step"] for row in long.rows]
    assert long.total == 5000
    assert MOST_SAMPLES // 3 < len(steps) <= MOST_SAMPLES + 1
    assert steps[-1] == 4999  # the last one is always there
    assert steps[:-1] == list(range(0, 5000, long.every))
    common = set(steps) & {row["step"] for row in short.rows}
    assert len(common) > 40


def test_memory_is_bounded_whatever_the_size_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_rlpt.reports.samples._MOST_BYTES", 1 << 20)
    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
    write_samples(tmp_path, 1500, text="x" * 10_000)
    with (tmp_path / "samples.jsonl").open("a") as out:
        out.write('{"step": 1500, "prefix": "' + "y" * (1 << 21) + '"}\n')
    assert (tmp_path / "samples.jsonl").stat().st_size > 25 << 20
    tracemalloc.start()
    found = read_samples(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert found.total == 1500
    assert found.notes == ("1 line of samples.jsonl left out: longer than 1 MiB.",)
    assert len(found.rows) > 20


def test_a_step_with_more_samples_than_a_page_holds(tmp_path):
    write_samples(tmp_path, 1, per_step=MOST_SAMPLES + 50)
    assert len(read_samples(tmp_path).rows) == MOST_SAMPLES


def test_a_sample_is_shown_as_its_judge_explained_it(tmp_path):
    row = read_samples(write_run(tmp_path / "run", steps=2)).rows[1]
    failed = row["candidates"][4]
    assert failed["failed"] == "safety: malformed verdict: no verdict in 'hmm'"
    assert failed["value"] is None
    first = row["candidates"][0]
    assert set(first["axes"]) == {"quality", "safety"}
    assert first["votes"][0] == {
        "axis": "quality",
        "verdict": "1 against 2: 1 is better",
        "reply": "Text 1 keeps to the subject, so it is better.",
    }


def test_rows_of_other_shapes_never_break_a_page():
    for row in (
        {"step": 1},
        {"step": 1, "candidates": "none", "chosen": "x", "prefix": None, "rewrite": 3},
        {"step": 1, "candidates": [1, {"detail": [], "value": "high"}, {"detail": {"axes": {"a": 2.0, "b": "x"}}}]},
        {"step": 1, "candidates": [{"detail": {"axes": {"a": {"votes": ["x", {"verdict": [1]}]}}}, "failed": "f"}]},
    ):
        json.dumps(shown_row(row), allow_nan=False)


def test_long_texts_keep_the_part_that_matters():
    text = "begin " + "x" * LONGEST_TEXT + " end"
    assert shown(text).startswith("begin xxx")
    assert shown(text).endswith("[10 characters left out]")
    assert shown(text, end=True).startswith("[10 characters left out] ")
    assert shown(text, end=True).endswith("x end")
    assert shown("a\r\nb\tc\x1b\u202e") == "a\nb\tc\\x1b\\u202e"


def test_what_differs_from_the_defaults(tmp_path):
    run = collect_run(write_run(tmp_path / "run", steps=1, **{"optimizer.lr": 0.125}))
    changed = run.changed()
    assert changed["optimizer.lr"] == (0.125, 5e-6)
    assert changed["data.sources[0].path"] == ("corpus/train.jsonl", None)
    assert "data.sources[0].weight" not in changed
    assert "optimizer.decay" not in changed


def test_names_of_equal_folders_have_their_parents(tmp_path):
    folders = [write_run(tmp_path / name, steps=1) for name in ("a/run", "b/run", "other")]
    assert [run.name for run in collect_runs(folders[1:])] == ["run", "other"]
    assert [run.name for run in collect_runs(folders[:2])] == ["a/run", "b/run"]


def test_a_number_alone_is_no_name(tmp_path):
    folders = [write_run(tmp_path / name, steps=1) for name in ("judge/1", "judge/2")]
    assert [run.name for run in collect_runs(folders)] == ["judge/1", "judge/2"]
    assert collect_run(folders[0]).name == "judge/1"


def test_an_evaluation_alone_is_enough(tmp_path):
    write_evaluation(tmp_path / "found")
    run = collect_run(tmp_path / "found")
    assert not run.is_run
    assert run.evaluation is not None


def broken(folder, case):
    folder.mkdir()
    match case:
        case "file":
            folder.rmdir()
            folder.write_text("")
        case "foreign":
            (folder / "notes.txt").write_text("x")
        case "record":
            (folder / "run.json").write_text("{")
        case "format":
            (folder / EVALUATION_FILE).write_text('{"format": 99}')
        case "evaluation":
            (folder / EVALUATION_FILE).write_text("[1, 2")
        case "list":
            (folder / EVALUATION_FILE).write_text("[1, 2]")
        case "damaged":
            data = write_evaluation(folder).to_json()
            del data["results"][0]["value"]
            (folder / EVALUATION_FILE).write_text(json.dumps(data))
        case "metrics":
            (folder / "metrics.jsonl").mkdir()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "does not exist; name the run.dir"),
        ("empty", "is empty; name the run.dir"),
        ("file", "is a file; name the folder"),
        ("foreign", "holds no run"),
        ("record", "run.json cannot be read"),
        ("format", "has format 99"),
        ("evaluation", "is not JSON"),
        ("list", "holds a list"),
        ("damaged", "is damaged"),
        ("metrics", "metrics.jsonl cannot be read"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, rlpt, case, says):
    folder = tmp_path / "run"
    if case != "missing":
        broken(folder, case)
    code, out, err = rlpt("report", folder)
    assert (code, out) == (DataError.exit_code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert str(folder) in err
