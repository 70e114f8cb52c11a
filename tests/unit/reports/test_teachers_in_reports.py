"""What a report says about teachers: how accurate those of a run are, and how one learns."""

from __future__ import annotations

import json

import pytest
from report_cases import write_card, write_run

from megatron_rlpt.config import Role
from megatron_rlpt.reports import JSON_FILE, MARKDOWN_FILE, write_report
from megatron_rlpt.reports.collect import collect_runs
from megatron_rlpt.reports.content import build_content
from megatron_rlpt.teacher.judge_card import kept_card


def with_metrics(folder, **metrics):
    """Add metrics, each as a function of the step, to every line of a run."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    added = [row | {name: value(row["step"]) for name, value in metrics.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in added))
    return folder


@pytest.fixture
def learnt(tmp_path):
    """A run in which a judge learns."""
    metrics = {
        "answers/right": lambda step: 0.5 + step / 40, "answers/parsed": lambda step: 1.0,
        "answers/right/looped": lambda step: 0.6, "evaluation/answers/right": lambda step: 0.4 + step / 40,
        "evaluation/answers/parsed": lambda step: 0.9, "evaluation/answers/flips": lambda step: 0.25,
        "evaluation/answers/right/looped": lambda step: 0.8, "evaluation/answers/right/safe text": lambda step: 0.7,
        "rewrites/copied": lambda step: 0.95, "answers/words": lambda step: 12.0, "answers/odd_one": lambda step: 3.0,
    }  # fmt: skip
    return with_metrics(write_run(tmp_path / "learnt", steps=20), **metrics)


def test_the_accuracy_of_a_runs_teachers_is_shown_without_their_folders(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    write_card(kept_card(folder, Role.judge))
    write_card(folder / "export", {"version": 1, "measured": {"quality, direct, full": {"accuracy": 0.7, "pairs": 8}}})
    page, markdown = write_report([folder]).read_text(), (folder / MARKDOWN_FILE).read_text()
    (cards,) = json.loads((folder / JSON_FILE).read_text())["cards"]
    assert [(row["whose"], row["axis"], row["asked"]) for row in cards["rows"]] == [
        ("judge", "quality", "reasoned, brief"), ("judge", "safety", "reasoned, brief"),
        ("trained here", "quality", "direct, full"),
    ]  # fmt: skip
    for text in (page, markdown):
        assert "93.0" in text
        assert "90 texts of data" in text
    assert "400 pairs of &lt;b&gt;data&lt;/b&gt;" in page
    assert "foreign" in page
    assert "55.0" in page
    assert 'href="#judges"' in page


def test_a_damaged_card_is_a_note(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    write_card(kept_card(folder, Role.rewriter), "{")
    (run,) = collect_runs([folder])
    assert run.cards == ()
    assert any(note.startswith("The accuracy of the model (rewriter) is not shown: ") for note in run.notes)


def test_a_judges_progress_is_drawn_in_words(learnt):
    runs = collect_runs([learnt])
    content = build_content(runs)
    charts = {chart["title"]: chart for chart in content.charts}
    assert charts["Right answers"]["labels"] == ("held-out prompts, greedy", "training prompts, sampled")
    assert charts["Right answers by kind, held-out prompts, greedy"]["labels"] == ("looped", "safe text")
    (alone,) = [chart for title, chart in charts.items() if title.startswith("Right answers by kind, training prompts")]
    assert alone["metrics"] == ("answers/right/looped",)
    assert charts["Answers with a verdict"]["share"]
    assert not charts["Length of answers: training prompts, sampled"]["share"]
    assert "Answers: odd one: training prompts, sampled" in charts
    assert "Winner changes with the order: held-out prompts, greedy" in charts
    assert "Good suffixes copied: training prompts, sampled" in charts
    assert "Quality on held-out prompts" in charts
    assert not [title for title in charts if title.startswith(("Looped", "Right on", "Parsed on", "Flips on"))]
    assert "of the answers to held-out prompts were right at first" in content.runs[0].sentences[-1]
    assert any(tile.label == "Right answers" for tile in content.tiles)


def test_two_judges_in_training_have_a_chart_per_kind(learnt, tmp_path):
    other = with_metrics(write_run(tmp_path / "other", steps=5), **{"answers/right": lambda step: 0.5})
    titles = [chart["title"] for chart in build_content(collect_runs([learnt, other])).charts]
    assert "Right answers: training prompts, sampled" in titles
    assert "Right answers by kind, held-out prompts, greedy: safe text" in titles
