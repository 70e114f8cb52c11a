"""The batch script when its components end; fakes of Slurm's programs record their calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.batch import setup_lines
from launch.slurm_jobs import Part

SHELLCHECK = Path(sys.executable).with_name("shellcheck")


class Job:
    """A batch script whose components are replaced by ``body``."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.shared = self.run / "cluster"
        self.asked = folder / "asked"
        self._bin = folder / "bin"
        self._bin.mkdir()
        for name in ("scontrol", "squeue"):
            program = self._bin / name
            # The fake squeue prints the file "state" for the other job.
            program.write_text(
                f'#!/bin/sh\necho "{name} $*" >>{self.asked}\n[ {name} = scontrol ] || cat {folder}/state\n'
            )
            program.chmod(0o755)
        self.state = folder / "state"
        self.state.write_text("RUNNING\n")

    def end(
        self, body: str, part: Part = Part.run, *, requeue: bool = True, start: int = 0, **site: list[str]
    ) -> tuple[int, str]:
        """Wait for the script to end; return exit code and output."""
        lines = setup_lines(str(self.run), part, requeue=requeue, **site)
        variables = {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(start),
        }
        # A file, as for a job: background processes would hold a pipe open.
        said = self._bin / "said"
        with said.open("w") as output:
            command = ["bash", "-c", f"{lines}\n{body}"]
            code = subprocess.run(command, env=variables, stdout=output, timeout=60).returncode
        return code, said.read_text()

    def requeued(self) -> list[str]:
        asked = self.asked.read_text().splitlines() if self.asked.exists() else []
        self.asked.unlink(missing_ok=True)
        return [line.removeprefix("scontrol ") for line in asked if line.startswith("scontrol")]


DONE = 'echo "$RLPT_START" >"$rlpt_shared/done"; exit 0'
STOPPED = 'echo "$RLPT_START" >"$rlpt_shared/stopped"; exit 0'


def steps(job: Job, number: int) -> str:
    """The run makes steps, then stops as requested."""
    return f'echo \'{{"step": {number}, "steps": 9}}\' >{job.run}/heartbeat.json; {STOPPED}'


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_trainer_that_is_done_is_a_job_that_is(job):
    assert job.end(DONE)[0] == 0
    assert job.requeued() == []


def test_one_that_failed_gives_its_exit_code_and_the_first_failure_is_said_last(job):
    failed = job.shared / "failed"
    later = f"echo second >{failed}/a; touch -d '1 hour ago' {failed}/a"
    sooner = f"echo first >{failed}/b; touch -d '2 hours ago' {failed}/b"
    code, said = job.end(f"{later}; {sooner}; exit 7")
    assert code == 7
    assert said.splitlines()[-2:] == ["second", "first"]
    assert job.requeued() == []


def test_the_exit_code_is_that_of_the_component_that_failed_first_whatever_srun_makes_of_it(job):
    failure = f"echo 7 >{job.shared}/jobs/run.exit_code"
    assert job.end(f"{failure}; exit 15")[0] == 7
    assert job.end("exit 15", start=1)[0] == 15, "what an earlier start said does not count"
    assert job.end(f"{failure}; {DONE}", start=2)[0] == 0, "a run that is done has not failed"


def test_one_that_stopped_as_asked_is_queued_again(job):
    code, said = job.end(steps(job, 3))
    assert (code, job.requeued()) == (75, ["requeue 7"])
    assert "requeued" in said
    code, said = job.end(steps(job, 4), requeue=False)
    assert (code, job.requeued()) == (75, ["update JobId=7 Requeue=0"])
    assert "run the same rlpt launch command" in said


def test_steps_that_ended_well_with_a_trainer_that_did_not_are_no_success(job):
    code, said = job.end("exit 0")
    assert (code, job.requeued()) == (143, [])
    assert "terminated before it was done" in said
    job.end(DONE)
    assert job.end("exit 0", start=1)[0] == 143, "what an earlier start said does not count"


def test_a_job_that_is_told_to_end_asks_for_a_checkpoint_and_is_not_queued_again(job):
    code, said = job.end(f"kill -TERM $$; [ -e {job.run}/stop ] || exit 9; {steps(job, 2)}")
    assert (code, job.requeued()) == (143, [])
    assert "received SIGTERM; requesting a checkpoint" in said


def test_two_starts_without_a_step_are_not_followed_by_a_third(job):
    assert job.end(STOPPED)[0] == 75
    code, said = job.end(STOPPED, start=1)
    assert code == 76
    assert "raise slurm.time or lower slurm.stop_lead" in said
    assert job.requeued() == ["requeue 7"]
    # With a step in between they are not in a row.
    assert [job.end(body, start=2)[0] for body in (STOPPED, steps(job, 1), STOPPED)] == [75, 75, 75]


@pytest.fixture
def pair(job) -> Job:
    """The run's training job is number 7, its judging job number 6."""
    (job.shared / "jobs").mkdir(parents=True)
    for part, number in ((Part.judging, 6), (Part.training, 7)):
        (job.shared / "jobs" / part).write_text(f"{number}\n")
    return job


def test_a_training_job_that_has_ended_says_so_to_the_judging_job(pair):
    assert pair.end("exit 7", Part.training)[0] == 7
    assert (pair.shared / "ended/7").read_text() == "7\n"
    assert pair.end(steps(pair, 1), Part.training)[0] == 75
    assert pair.requeued() == ["requeue 7"]
    assert not (pair.shared / "ended/7").exists(), "one that is queued again has not ended"


@pytest.mark.parametrize("how", ["stopped", "without a buffer"])
def test_without_a_judging_job_training_waits_in_the_queue_until_there_is_one(pair, how):
    pair.state.write_text("PENDING\n")
    body = steps(pair, 1) if how == "stopped" else "exit 9"
    assert pair.end(body, Part.training)[0] == 75
    assert pair.requeued() == ["requeuehold 7"]
    assert (pair.shared / "held").exists()
    pair.state.write_text("RUNNING\n")
    (pair.shared / "handover").unlink()
    assert pair.end("exit 9", Part.training)[0] == 9, "with one, a buffer that is gone is a failure"


def test_a_judging_job_that_slurm_has_no_more_is_taken_for_ended(pair):
    pair.state.write_text("")
    body = f"while [ ! -e {pair.shared}/ended/6 ]; do sleep 0.2; done; exit 6"
    assert pair.end(body, Part.training)[0] == 6
    assert (pair.shared / "ended/6").read_text() == "6\n"


def test_setup_lines_reach_the_components_and_one_that_fails_ends_the_job(job):
    code, said = job.end(f'echo "A is $A"; {DONE}', setup=["export A='x y'", "B=$A"])
    assert (code, "A is x y" in said) == (0, True)
    code, said = job.end(f"echo started; {DONE}", setup=["source /not/there", "true"])
    assert code == 2
    assert "started" not in said
    assert said.splitlines()[-1].startswith("error: setup of the cluster file: source /not/there failed on ")
    assert job.end(DONE, setup=["if ("])[0] == 2


def test_modules_are_loaded_in_order_and_a_missing_one_ends_the_job(job):
    define = 'module() { [ "$2" != gone ] && export LOADED="$LOADED $2"; }; export -f module; true'
    asked = setup_lines(str(job.run), Part.run, requeue=False, modules=["cuda/12.4", "nccl"])
    said = subprocess.run(
        ["bash", "-c", f"{define}; {asked}\necho loaded:$LOADED"],
        env={"PATH": f"{job._bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    ).stdout
    assert "loaded: cuda/12.4 nccl" in said
    code, said = job.end(DONE, modules=["gone"])
    assert code == 2
    assert said.splitlines()[-1].startswith("error: modules of the cluster file: module load gone failed on ")


@pytest.mark.parametrize("requeue", [True, False])
@pytest.mark.parametrize("part", Part)
def test_what_is_rendered_has_no_placeholder_left_and_passes_the_linter(part, requeue, tmp_path):
    script = tmp_path / "job.sh"
    lines = setup_lines("/a b/c", part, requeue=requeue, modules=["cuda/12"], setup=["export A='x y'"])
    script.write_text(f"#!/bin/bash\n{lines}\n")
    assert not re.search("@[A-Z_]+@", lines)
    done = subprocess.run([shutil.which("shellcheck") or SHELLCHECK, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
