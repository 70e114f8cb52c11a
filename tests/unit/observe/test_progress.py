"""The progress display: compact lines away from a terminal, a live display on one."""

import io

import pytest
from rich.console import Console

from megatron_rlpt.observe import Progress
from megatron_rlpt.observe import progress as module

METRICS = {"loss": 0.69315, "reward_margin": -0.0125, "rollout_chosen_rate": 0.5, "grad_norm": 3.0}


def test_one_plain_line_per_step_without_a_terminal():
    out = io.StringIO()
    with Progress(20, 2, Console(file=out, width=40)) as progress:
        progress.stage("rollout")
        progress.step(2, METRICS, {"rollout": 4.06, "update": 61.0})
        progress.step(3, {}, {})
    first, second = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert first.startswith("step 3/20  eta ")
    assert first.endswith("loss 0.6932  margin -0.0125  rollout chosen 0.5  rollout 4.1s  update 61.0s")
    assert second == "step 4/20  eta 0s"


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, "eta 9s"), (10.0, "eta 1m30s"), (1000.0, "eta 2h30m")])
def test_remaining_time(monkeypatch, seconds, shown):
    now = iter([0.0, 0.0, seconds])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    progress = Progress(10, 0, Console(file=out))
    progress.__enter__()
    progress.step(0, {}, {})
    assert out.getvalue() == f"step 1/10  {shown}\n"


def test_live_display_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with Progress(20, 0, console) as progress:
        progress.stage("rollout")
        progress.step(0, METRICS, {"rollout": 4.06})
        progress.stage("[judge]")
        console.print(progress._render())
    text = out.getvalue()
    for part in ("1/20", "[judge]", "loss 0.6932", "margin -0.0125", "rollout chosen 0.5", "rollout 4.1s", "done"):
        assert part in text


def test_a_broken_off_run_is_not_shown_as_done():
    out = io.StringIO()
    with pytest.raises(RuntimeError), Progress(20, 0, Console(file=out, force_terminal=True, width=100)):
        raise RuntimeError
    assert "stopped" in out.getvalue()
    assert "done" not in out.getvalue()
