"""``rlpt launch`` on a real Slurm: time limits, signals, lost nodes and cancelled jobs, and how the run resumes."""

from __future__ import annotations

import re

import pytest
from slurm_launches import QUICK, STEPS, assert_equal_runs

pytestmark = pytest.mark.slurm


def test_the_time_is_up_then_the_node_is_lost_and_the_job_goes_on_where_it_was(undisturbed, cluster, launched):
    run = launched(stop_lead=120)
    run.launch(*QUICK)
    run.wait(lambda: run.steps() >= 2)
    with run.buffer() as buffer:
        buffer.drain(True)  # the trainer waits, as in a long step
    # Now, not after a time that a busy machine may need to come up: as much is left as the run is told before.
    spent = int(cluster.run("squeue", "--noheader", f"--jobs={run.job()}", "--format=%M").split(":")[0])
    cluster.run("scontrol", "update", f"jobid={run.job()}", f"timelimit={spent + 3}")
    run.wait(lambda: "requeued" in run.output())
    cluster.run("scontrol", "update", f"jobid={run.job()}", "timelimit=30")
    done = run.steps()
    assert done < STEPS
    assert "requesting a checkpoint" in run.output()
    run.wait(lambda: run.start_of("judges-00000").endswith(".1"))
    with run.buffer() as buffer:
        buffer.drain(False)
        run.wait(lambda: run.steps() > done)
        buffer.drain(True)
    assert f"steps={done}" in (run.folder / "run.log").read_text()
    assert run.steps() < STEPS

    node = cluster.run("squeue", "--noheader", f"--jobs={run.job()}", "--format=%N").strip()
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    run.wait(lambda: run.start_of("judges-00000").endswith(".2"))
    with run.buffer() as buffer:
        buffer.drain(False)
    assert run.ended() == ("COMPLETED", "0:0"), run.output()
    run.wait(lambda: "down" not in cluster.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T"))
    assert run.start_of("trainer-00000").endswith(".2")
    # The second time from the checkpoint of the first, or from the one of the step that was under way: Slurm asks what
    # it requeues to end, where it still can.
    assert len(re.findall(r"resumed .*steps=[1-9]", (run.folder / "run.log").read_text())) == 2
    assert_equal_runs(run.folder, undisturbed)


def test_a_job_of_several_ranks_that_is_told_to_end_leaves_a_checkpoint_and_goes_on(cluster, launched):
    """Every process of the job gets a signal, as sites send before they reclaim nodes; with vLLM in the trainer."""
    run = launched(trainer={"ranks_per_node": 2})
    run.launch("train.steps=100000")
    run.wait(lambda: run.steps() >= 1)
    cluster.run("scancel", "--signal=TERM", run.job())
    run.wait(lambda: "requeued" in run.output())
    run.cancel()
    done = run.steps()
    assert list((run.folder / "checkpoints").glob(f"step-*{done}")), "what was done is in a checkpoint"
    assert not list((run.folder / "cluster/failed").iterdir()), "and nothing has failed"


def test_judging_in_a_job_of_its_own_whose_time_is_up_goes_on_together_with_training(undisturbed, cluster, launched):
    run = launched(allocation="separate")
    run.launch(*QUICK)
    run.wait(lambda: run.steps() >= 2)
    with run.buffer() as buffer:
        buffer.drain(True)
    cluster.run("scancel", "--batch", "--signal=USR1", run.job("judging"))
    for part in ("training", "judging"):
        run.wait(lambda part=part: "requeued" in run.output(part))
    done = run.steps()
    assert done < STEPS
    run.wait(lambda: run.start_of("judges-00000").endswith(".1"))
    with run.buffer() as buffer:
        buffer.drain(False)
    assert run.ended("training") == ("COMPLETED", "0:0"), run.output("training")
    assert run.ended("judging") == ("COMPLETED", "0:0"), run.output("judging")
    assert run.start_of("trainer-00000").endswith(".1")
    assert f"steps={done}" in (run.folder / "run.log").read_text()
    assert_equal_runs(run.folder, undisturbed)


def test_a_judging_job_that_is_cancelled_ends_the_training_job_with_a_checkpoint(cluster, launched):
    run = launched(allocation="separate")
    run.launch(*QUICK, "train.steps=100000")
    run.wait(lambda: run.steps() >= 1)
    cluster.run("scancel", run.job("judging"))
    assert run.ended("training") == ("FAILED", "6:0"), run.output("training")
    assert "the judging job ended" in run.output("training").rstrip().splitlines()[-1]
    assert list((run.folder / "checkpoints").glob("step-*"))
