"""Files of experiments: what is wrong in one is one line; the order of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.experiments.spec import RowRun, load_experiment

SHIPPED = Path(__file__).resolve().parents[3] / "configs/experiments/small_world.yaml"
RUN = {
    "run": {"dir": "elsewhere"},
    "model": {"path": "fresh"},
    "data": {"sources": [{"path": "a.jsonl"}]},
    "candidates": {"rollouts": 0},
    "objective": {"name": "ntp"},
    "train": {"steps": 2},
}


def write(folder, **changed):
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    spec = {
        "dir": "runs/x",
        "seeds": [1, 2],
        "against": "base",
        "measure": {"world": "runs/world"},
        "rows": [
            {"name": "base", "config": "run.yaml"},
            {"name": "more", "config": "run.yaml", "start": "base", "set": {"train.steps": 5}},
            {"name": "alone", "config": "run.yaml", "seeds": [2]},
        ],
        "tables": [{"name": "t", "rows": ["base", "more"], "columns": ["win"], "paper": {"more": {"win": 5.0}}}],
        "claims": [{"text": "more is better", "better": "more", "worse": "base", "column": "win"}],
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(spec | changed))
    return path


def test_runs_come_seed_by_seed_with_what_they_need_first(tmp_path):
    experiment = load_experiment(write(tmp_path))
    everything = [RowRun("base", 1), RowRun("more", 1), RowRun("base", 2), RowRun("more", 2), RowRun("alone", 2)]
    assert experiment.jobs([], []) == everything
    assert experiment.jobs(["more"], [2]) == [RowRun("base", 2), RowRun("more", 2)]
    assert experiment.jobs(["alone"], []) == [RowRun("alone", 2)]


def test_a_row_changes_options_starts_at_another_row_and_has_its_own_folder(tmp_path):
    experiment = load_experiment(write(tmp_path))
    config = experiment.config(RowRun("more", 2))
    assert (config.train.steps, config.run.seed) == (5, 2)
    assert (config.run.dir, config.model.path) == ("runs/x/more/seed2", "runs/x/base/seed2/export")
    assert experiment.config(RowRun("base", 2)).model.path == "fresh"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": []}, "rows is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"against": "nobody"}, "against is 'nobody'; allowed: base, more, alone"),
        ({"rows": [{"name": "base", "config": "run.yaml"}] * 2}, "rows has base 2 times"),
        ({"rows": [{"name": "../x", "config": "run.yaml"}]}, "rows has the name '../x'; allowed: a-z, 0-9 and _"),
        (
            {"rows": [{"name": "base", "config": "run.yaml", "start": "later"}]},
            "row base starts from 'later'; allowed: a row before it (none)",
        ),
        (
            {"rows": [{"name": "base", "config": "run.yaml", "set": {"train.step": 1}}]},
            "row base: ",
        ),
        ({"rows": [{"name": "base", "config": "none.yaml"}]}, "row base: "),
        ({"rows": [{"name": "base", "confg": "run.yaml"}]}, "confg"),
        ({"tables": [{"name": "t", "rows": ["less"]}]}, "a row of table t is 'less'; allowed: base"),
        ({"tables": [{"name": "t", "columns": ["wins"]}]}, "a column of table t is 'wins'; allowed: win, "),
        ({"claims": [{"text": "c", "better": "less", "column": "win"}]}, "a row of the claim 'c' is 'less'"),
        (
            {"tables": [{"name": "t", "columns": ["judged_win"]}]},
            "a column of table t is judged_win, but measure.judge is empty; name a second judge",
        ),
        (
            {"measure": {"world": "w", "judge": "none.yaml"}},
            "measure.judge: ",
        ),
        (
            {
                "measure": {"world": "w", "judge": "run.yaml"},
                "rows": [
                    {"name": "base", "config": "run.yaml"},
                    {
                        "name": "sip",
                        "config": "run.yaml",
                        "set": {"objective.name": "online_dpo", "candidates.rollouts": 2},
                    },
                ],
            },
            "measure.judge is run.yaml, whose judge (likelihood ) trains the row sip; name a judge that trains none",
        ),
        ({"claims": [{"text": "c", "better": "base", "column": "won"}]}, "the column of the claim 'c' is 'won'"),
        ({"measure": {"world": "w", "prefixes": 1}}, "measure.prefixes is 1; allowed: at least 2"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, changed, said):
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, **changed))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "seeds", "said"), [(["x"], [], "--rows has 'x'"), ([], [9], "--seeds has 9")])
def test_what_is_not_there_cannot_be_run(tmp_path, rows, seeds, said):
    with pytest.raises(ConfigError, match=said):
        load_experiment(write(tmp_path)).jobs(rows, seeds)


def test_the_shipped_experiment_has_every_row_of_the_papers_tables(monkeypatch):
    monkeypatch.chdir(SHIPPED.parents[2])
    experiment = load_experiment(SHIPPED)
    tables = {table.name: table for table in experiment.spec.tables}
    assert len(tables["objectives"].paper) == 12
    assert {f"quality_{count}" for count in (1, 2, 4, 8, 16)} <= set(experiment.rows)
    assert {"judge_round_robin", "judge_tournament", "judge_pivot"} <= set(experiment.rows)
    assert len(experiment.spec.seeds) >= 3
    trained = load_experiment(SHIPPED.with_name("trained_teacher.yaml"))
    assert set(trained.rows) == {"base", "ntp", "sip", "ntp_ordinary", "sip_factual"}
