import io
import json
import re
from html.parser import HTMLParser

import pytest
from evaluation_cases import LOOP, LoopJudge, Opposite, make_report, write_metrics
from rich.console import Console

from megatron_rlpt.evaluation.render import NO_BASELINE, headline, print_report, write_report
from megatron_rlpt.evaluation.report import read_training_curves, readable

pytestmark = pytest.mark.slow

HOSTILE = "</td><script>alert(1)</script> {{ 7 * 7 }} [bold]$x^2$ & \"'"


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


class Tags(HTMLParser):
    """Tag names and attributes of a page, checking that what is opened is closed."""

    void = {"meta", "br", "img", "link", "path", "use", "rect"}

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.attributes = [], set(), []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.attributes += attributes
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


@pytest.fixture
def run_dir(tmp_path):
    write_metrics(tmp_path)
    return tmp_path


def written(run_dir, report):
    json_path, html_path = write_report(run_dir, report)
    return json.loads(json_path.read_text(), parse_constant=no_constant), html_path.read_text()


def terminal(report):
    console = Console(file=io.StringIO(), width=100)
    print_report(report, console)
    return console.file.getvalue()


def test_report_json_holds_the_promised_keys(run_dir):
    report, page = written(run_dir, make_report(run_dir, second=LoopJudge()))
    for rates in (
        report["win_rate"],
        report["baseline_ntp"]["win_rate"],
        *report["second_measure"]["win_rate"].values(),
    ):
        for mode, count in (("sampled", 80), ("greedy", 40)):
            low, high = rates[mode]["ci95"]
            assert 0 <= low <= rates[mode]["mean"] <= high <= 1
            assert rates[mode]["n"] == count
    for repetition in (report["repetition"], report["baseline_ntp"]["repetition"]):
        assert set(repetition) == {"start", "end", "start_sampled", "end_sampled", "original"}
    assert set(report["trained_minus_baseline"]) == {"sampled", "greedy"}
    assert set(report["second_measure"]["mean_score"]) == {"start", "trained", "baseline", "original"}
    assert "(mean, share)" in page
    assert "The second measure, which took no part in training, is the share of loops." in page
    assert report["steps"] == list(range(1, 61))
    assert len(report["rollout_chosen_rate"]) == len(report["loss"]) == len(report["reward_margin"]) == 60
    assert list(report["step_seconds"]) == ["rollout", "judge", "reference", "update", "sync"]
    assert report["step_seconds"]["sync"] == pytest.approx(0.4)
    assert report["notes"] == []
    assert report["config"]["objective.name"] == "online_dpo"
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["numpy"]
    assert {"prefix", "start", "trained", "baseline", "original"} <= set(report["examples"][0])
    assert len(report["examples"]) == 3


def test_page_stands_alone_and_shows_every_plot(run_dir):
    _, page = written(run_dir, make_report(run_dir, second=LoopJudge()))
    tags = Tags(page)
    assert page.count("<svg") == 6
    assert not {"script", "link", "img", "iframe"} & tags.seen
    for name, value in tags.attributes:
        if name.endswith(("href", "src")):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", page)
    assert "prefers-color-scheme: dark" in page
    # A fixed colour in a plot would vanish in one of the two themes.
    plots = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", plots)) == set()
    ids = re.findall(r'\bid="([^"]*)"', plots)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', plots)) <= set(ids)


def test_hostile_text_is_shown_not_run(run_dir):
    report = make_report(run_dir, decoder=lambda tokens: HOSTILE)
    report["config"]["model.path"] = HOSTILE
    report["step_seconds"] = {HOSTILE: 1.0}
    _, page = written(run_dir, report)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }}" in page
    assert "script" not in Tags(page).seen
    assert "[bold]" in terminal(report)


def test_control_characters_and_half_characters_do_not_reach_the_files(run_dir):
    report, page = written(run_dir, make_report(run_dir, decoder=lambda tokens: "a\x1b[31mb\x00c\ud800d\u202ee\r\nf"))
    assert report["examples"][0]["prefix"] == "a\ufffd[31mb\ufffdc\ufffdd\ufffde\nf"
    assert "\x1b" not in page
    assert readable("fine\n\ttext, 👩‍🔬") == "fine\n\ttext, 👩‍🔬"


def test_without_a_baseline_the_report_says_so(run_dir):
    report, page = written(run_dir, make_report(run_dir, baseline=False, second=LoopJudge()))
    assert report["baseline_ntp"] is None
    assert report["trained_minus_baseline"] is None
    assert NO_BASELINE in page
    assert "baseline" not in report["examples"][0]
    assert NO_BASELINE in " ".join(terminal(report).split())
    Tags(page)


def test_without_a_second_measure_the_report_says_so(run_dir):
    report, page = written(run_dir, make_report(run_dir))
    assert report["second_measure"] is None
    assert "This evaluation has no second measure" in page


def test_without_metrics_there_are_no_training_plots_but_a_sentence(tmp_path):
    report, page = written(tmp_path, make_report(tmp_path))
    assert (report["rollout_chosen_rate"], report["step_seconds"]) == ([], {})
    assert page.count("<svg") == 2
    assert "There is no metrics.jsonl in the run folder" in page
    Tags(page)


def test_a_missing_metric_leaves_out_its_plot_only(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n')
    report, page = written(tmp_path, make_report(tmp_path))
    assert report["loss"] == [0.5, None]
    assert page.count("<svg") == 3
    assert "holds no reward_margin" in page
    assert "holds no loss" not in page


def test_metrics_of_a_killed_and_resumed_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3, "seconds/rollout": 2, "seconds/step": 9}\n'
        '{"step": 2, "loss": 2, "seconds/rollout": 4}\n{"step": 3, "lo\n'
        '[1]\n\n{"step": 2, "loss": 1, "seconds/rollout": 6, "seconds/checkpoint": 1}\n'
    )
    curves = read_training_curves(tmp_path)
    assert (curves.steps, curves.loss) == ([1, 2], [3, 1])
    assert curves.step_seconds == {"rollout": 4, "checkpoint": 0.5}
    assert curves.notes[0].startswith("2 line(s)")


def test_a_figure_that_is_not_a_number_never_becomes_json(run_dir):
    report = make_report(run_dir)
    report["repetition"]["start"] = float("nan")
    with pytest.raises(ValueError):
        write_report(run_dir, report)
    assert not (run_dir / "report.json").exists()


def test_failed_comparisons_are_mentioned(run_dir):
    report, page = written(run_dir, make_report(run_dir, judge=LoopJudge(fails_on=LOOP)))
    failed = sum(report["win_rate"][mode]["failed"] for mode in ("sampled", "greedy"))
    assert failed > 0
    assert f"{failed} of 120 comparisons" in page


def test_a_disagreeing_second_measure_is_called_out(run_dir):
    assert any("against the judge" in text for text in headline(make_report(run_dir, second=Opposite())))
    assert any("as the judge does" in text for text in headline(make_report(run_dir, second=LoopJudge())))


def test_a_report_can_be_written_again(run_dir):
    report = make_report(run_dir)
    write_report(run_dir, report)
    report["prefixes"] = 41
    assert written(run_dir, report)[0]["prefixes"] == 41
    assert not list(run_dir.glob("*.partial"))
