"""The three files of a report, and what they say."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from report_cases import HOSTILE, write_evaluation, write_run
from rich.console import Console
from without_torch import run_without_torch

from megatron_rlpt.config.evaluation_sets import ALL_SETS
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation.results import Result, Scale
from megatron_rlpt.reports import JSON_FILE, MARKDOWN_FILE, PAGE_FILE, print_evaluation, show_evaluation, write_report
from megatron_rlpt.reports.collect import collect_runs
from megatron_rlpt.reports.content import build_content
from megatron_rlpt.reports.figures import beyond_chance, difference_of, duration, short, with_interval
from megatron_rlpt.reports.summary import evaluation_sentences, limit_sentences
from megatron_rlpt.reports.tables import result_table


@pytest.fixture(scope="module")
def sip(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "sip", steps=20)
    write_evaluation(folder)
    return folder


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_three_files_say_the_same(sip, rlpt, tmp_path):
    code, out, err = rlpt("report", sip, "--out", tmp_path / "new/folder")
    assert (code, err) == (0, "")
    assert str(tmp_path / "new/folder/report.html") in out
    page, markdown, data = (
        (tmp_path / "new/folder" / name).read_text() for name in (PAGE_FILE, MARKDOWN_FILE, JSON_FILE)
    )
    found = json.loads(data, parse_constant=no_constant)
    quality = [one for one in found["results"] if one["measure"] == "quality" and one["scale"] == "win_rate"]
    assert len(quality) == 8
    for one in quality:
        shown = f"{100 * one['value']:.1f}\N{NO-BREAK SPACE}%"
        assert shown in page
        assert shown.replace("\N{NO-BREAK SPACE}", " ") in markdown
    assert {one["judge"]: one["in_sample"] for one in quality} == {"likelihood": True, "second": False}
    assert found["runs"][0]["curves"]["loss"]["steps"] == list(range(20))
    assert found["runs"][0]["state"] == "finished"
    assert "likelihood (in-sample)" in markdown
    assert "## Agreement of judges" in markdown


def test_a_report_of_one_run_goes_into_its_folder(sip):
    assert write_report([sip]) == sip / PAGE_FILE
    before = {path.name: path.read_bytes() for path in sip.iterdir() if not path.name.startswith("report.")}
    write_report([sip])
    assert {path.name: path.read_bytes() for path in sip.iterdir() if not path.name.startswith("report.")} == before


def test_a_page_names_the_hash_of_its_script_and_nothing_else(sip):
    page = write_report([sip]).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'$", policy)
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)|<link|<img", page)


def test_several_runs_need_a_folder_and_are_given_once(sip, tmp_path, rlpt):
    other = write_run(tmp_path / "other", steps=5)
    code, _, err = rlpt("report", sip, other)
    assert code == ConfigError.exit_code
    assert "--out" in err
    code, _, err = rlpt("report", sip, sip / ".", "--out", tmp_path / "x")
    assert code == DataError.exit_code
    assert "is given twice" in err
    (tmp_path / "taken").write_text("")
    code, _, err = rlpt("report", sip, "--out", tmp_path / "taken")
    assert code == ConfigError.exit_code
    assert "cannot be written" in err
    assert err.count("\n") == 1


def test_a_comparison_has_differences_of_results_and_options(sip, tmp_path):
    other = write_run(tmp_path / "other", steps=20, **{"optimizer.lr": 0.5})
    found = write_evaluation(other)
    raised = tuple(replace(one, value=one.value + 0.05) if one.model == "sip" else one for one in found.results)
    write_evaluation(other, results=raised)
    write_report([sip, other], tmp_path)
    data = json.loads((tmp_path / JSON_FILE).read_text())
    assert data["differences"]["optimizer.lr"] == ["5e-06", "0.5"]
    assert "optimizer.decay" not in data["differences"]
    markdown = (tmp_path / MARKDOWN_FILE).read_text()
    row = next(
        line for line in markdown.splitlines() if line.startswith("| quality, win rate") and "second | greedy" in line
    )
    cells = [cell.strip() for cell in row.split("|")[5:]]
    assert "points" not in cells[0] + cells[1]  # the first run is what others are compared with
    assert "+5.0 points" in cells[2]  # sip with sip
    assert "+0.0 points" in cells[3]  # the baseline with the baseline


def test_the_model_that_runs_started_from_is_one_column(tmp_path):
    one, other = write_evaluation(tmp_path / "a"), write_evaluation(tmp_path / "b", seed=2, model="dpo")
    table = result_table({0: one, 1: other}, ["a", "b"])
    assert [column.title for column in table.columns] == ["a: sip", "a: next-token", "b: dpo", "b: next-token", "start",
                                                      "original text"]  # fmt: skip
    assert table.models["0/start"] == table.models["1/start"] == 4
    (distinct,) = [row for row in table.rows if row.measure == "distinct_2"]  # nobody decoded the original text
    assert len(distinct.cells) == 6
    alone = replace(one, models=one.models[:2])
    assert result_table({0: alone, 1: other}, ["a", "b"]).columns[0].title == "a"


def test_a_judge_that_rewarded_training_is_marked_everywhere(tmp_path):
    found = write_evaluation(tmp_path / "a")
    trained = replace(found, judges=tuple(replace(judge, in_sample=True) for judge in found.judges))
    console = Console(file=io.StringIO(), width=200)
    print_evaluation(trained, console)
    text = console.file.getvalue()
    assert text.count("second (in-sample)") >= 5
    assert "A judge marked in-sample" in text


def test_the_headline_prefers_a_judge_that_did_not_train(tmp_path):
    write_evaluation(tmp_path / "a")
    console = Console(file=io.StringIO(), width=200)
    print_evaluation(write_evaluation(tmp_path / "a"), console)
    first = console.file.getvalue().strip().splitlines()[0]
    assert first.strip().startswith("sip is better than start in quality according to second: it wins ")


def test_show_evaluation_prints_and_writes(tmp_path, capsys):
    write_evaluation(tmp_path / "a")
    show_evaluation(tmp_path / "a")
    assert "evaluation of sip, next-token against start" in (tmp_path / "a" / PAGE_FILE).read_text()
    assert str(tmp_path / "a" / PAGE_FILE) in capsys.readouterr().out
    assert (tmp_path / "a" / MARKDOWN_FILE).is_file()
    with pytest.raises(DataError, match=r"no evaluation\.json"):
        show_evaluation(tmp_path)


def test_markdown_is_not_broken_by_hostile_names(tmp_path):
    folder = write_run(tmp_path / "a|b", steps=2, **{"model.path": HOSTILE["markdown"]})
    write_evaluation(folder, model="x|y\n# z <b>", notes=(HOSTILE["end of script"], HOSTILE["direction"]))
    markdown = (write_report([folder]).parent / MARKDOWN_FILE).read_text()
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "quality" in line}
    assert widths == {9, 7}  # results with eight columns, agreements with six
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    assert "\u202e" not in markdown
    assert "\n# z" not in markdown


def test_a_run_with_nothing_yet(tmp_path):
    folder = write_run(tmp_path / "new", steps=0, of=10, state="running", age=1.0)
    page = write_report([folder]).read_text()
    assert "0 of 10 steps are done" in page
    data = json.loads((folder / JSON_FILE).read_text())
    assert data["results"] == []
    assert any("no step yet" in note for note in data["runs"][0]["notes"])


def test_content_of_many_runs(tmp_path):
    runs = collect_runs([write_run(tmp_path / f"r{number}", steps=3, seed=number) for number in range(9)])
    content = build_content(runs)
    assert content.title == "Comparison of 9 runs"
    assert len(content.curves) == 9


@pytest.mark.parametrize(
    ("result", "text", "side"),
    [
        (Result("q", Scale.win_rate, "m", "s", 0.84, (0.801, 0.875)), "84.0 % (80.1 to 87.5 %)", 1),
        (Result("q", Scale.win_rate, "m", "s", 0.4, (0.3, 0.5)), "40.0 % (30.0 to 50.0 %)", 0),
        (Result("q", Scale.win_rate, "m", "s", 0.4, (0.3, 0.49)), "40.0 % (30.0 to 49.0 %)", -1),
        (Result("q", Scale.difference, "m", "s", -0.1, (-0.2, 0.1)), "-10.0 points (-20.0 to +10.0)", 0),
        (Result("q", Scale.value, "m", "s", 12.345678, unit="nats"), "12.35 nats", None),
    ],
)
def test_numbers_are_written_in_their_scale(result, text, side):
    assert with_interval(result).replace("\N{NO-BREAK SPACE}", " ") == text
    assert beyond_chance(result) == side


def test_differences_durations_and_short_numbers():
    one = Result("q", Scale.value, "m", "s", 14.0)
    assert difference_of(replace(one, value=12.5), one) == "-1.5"
    assert difference_of(replace(one, scale=Scale.share, value=0.5), replace(one, value=0.25)) == "+25.0 points"
    assert [duration(seconds) for seconds in (45, 700, 11_100, 190_000)] == ["45 s", "12 min", "3 h 05 min", "2 d 4 h"]
    assert [short(value) for value in (0.0, 5e-6, 12.3456, 45678.9, None)] == ["0", "5e-06", "12.35", "45679", "–"]  # noqa: RUF001


def test_a_report_needs_no_torch(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    write_evaluation(folder)
    done = run_without_torch(
        "from megatron_rlpt.cli.main import main; sys.argv[0] = 'rlpt'; main()", "report", str(folder)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / PAGE_FILE).is_file()


def test_measures_while_training_have_a_line_per_judge(tmp_path):
    runs = collect_runs([write_run(tmp_path / name, steps=20) for name in ("a", "b")])
    alone = {chart["title"]: chart for chart in build_content(runs[:1]).charts}
    quality = alone["Quality on held-out prefixes"]
    assert quality["labels"] == ("judge (in-sample)", "second")
    assert quality["share"]
    assert quality["middle"]
    assert not alone["Length on held-out prefixes"]["share"]
    beside = [chart["title"] for chart in build_content(runs).charts]
    assert beside[:3] == [
        "Quality on held-out prefixes: judge (in-sample)",
        "Quality on held-out prefixes: second",
        "Length on held-out prefixes",
    ]
    assert "Who wins: rollout" in beside


def test_the_headline_takes_the_mean_over_sets(tmp_path):
    found = write_evaluation(tmp_path / "a")
    mean = replace(found.find(measure="safety", model="sip")[0], set=ALL_SETS, value=0.77)
    (sentence,) = [
        one
        for one in evaluation_sentences(replace(found, results=(*found.results, mean)))
        if one.startswith("sip has safety")
    ]
    assert "77.0" in sentence
    assert "on all sets, greedy" in sentence


def test_failed_verdicts_are_counted_once(tmp_path):
    found = write_evaluation(tmp_path / "a")
    rates = found.find(measure="quality", scale=Scale.win_rate)
    safety = found.find(measure="safety")
    decided = sum(one.n for one in [*rates, *safety])
    assert f"8 of {decided + 8} verdicts and comparisons are left out" in " ".join(limit_sentences(found))
