"""What a launch needs of Slurm, in the sandbox: records of ended jobs, requeueing, signals before the end."""

from __future__ import annotations

import stat
import subprocess

import pytest

pytestmark = pytest.mark.slurm


def test_the_database_is_for_its_owner_alone(cluster):
    assert stat.S_IMODE((cluster.folder / "slurmdbd.conf").stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700


def test_accounting_knows_how_a_job_ended(cluster):
    failed, done = cluster.submit("exit 3"), cluster.submit("exit 0")
    assert cluster.wait_for_record(failed, "FAILED")["code"] == "3:0"
    assert cluster.wait_for_record(done, "COMPLETED")["code"] == "0:0"


def test_a_requeued_job_runs_again_and_knows_it(cluster):
    script = 'echo "run ${SLURM_RESTART_COUNT:-0}"\n[ -n "$SLURM_RESTART_COUNT" ] || exec sleep 600\n'
    job = cluster.submit(script, "--requeue")
    cluster.wait_for_line(job, "run 0")
    cluster.run("scontrol", "requeue", str(job))
    cluster.wait_for_line(job, "run 1")
    assert cluster.wait_for_record(job, "COMPLETED")
    assert cluster.wait_for_record(job, "REQUEUED", "--duplicates")


def test_the_signal_comes_before_the_time_is_up(cluster):
    """Slurm rounds limits up to a minute and checks them every 30 s, so the signal may be that early."""
    script = "trap 'echo signal; kill $!; exit 5' USR1\necho ready\nsleep 600 &\nwait\n"
    job = cluster.submit(script, "--time=0:20", "--signal=B:USR1@20")
    cluster.wait_for_line(job, "signal")
    assert cluster.wait_for_record(job, "FAILED")["code"] == "5:0"


def test_one_job_of_two_parts_runs_both_and_is_requeued_as_one(cluster):
    """Only the backfill scheduler starts such jobs, so the second start takes up to a minute."""
    script = (
        "#SBATCH --ntasks=1\n#SBATCH hetjob\n#SBATCH --ntasks=1\n"
        "srun --het-group=0,1 bash -c 'echo part $SLURM_PROCID of $SLURM_HET_SIZE, run ${SLURM_RESTART_COUNT:-0}'\n"
        '[ -n "$SLURM_RESTART_COUNT" ] || exec sleep 600\n'
    )
    job = cluster.submit(script, "--requeue")
    for part in (0, 1):
        cluster.wait_for_line(job, f"part {part} of 2, run 0")
    cluster.run("scontrol", "requeue", str(job))
    for part in (0, 1):
        cluster.wait_for_line(job, f"part {part} of 2, run 1")


def test_a_job_for_a_large_cluster_can_be_tried(cluster):
    large = ("sbatch", "--test-only", "--partition=imagined", "--nodes=256", "--wrap=true")
    cluster.run(*large, "--gpus-per-node=8", "--ntasks-per-node=8")
    refused = subprocess.run([*large, "--gpus-per-node=9"], env=cluster.variables, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "Requested node configuration is not available" in refused.stderr
