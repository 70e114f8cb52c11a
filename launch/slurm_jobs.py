"""Judging and training as two jobs that watch each other (``slurm.allocation: separate``).

    judging job   buffer, servers of the teacher, judge workers   starts first
    training job  the trainer's ranks                             starts after it (``--dependency=after``)

    what happens                               what follows
    -----------------------------------------  ------------------------------------------------------------------
    training is done, failed or was cancelled  the judging job ends
    judging failed or was cancelled            checkpoint; the training job ends with the exit code of the other
    training's time is up                      checkpoint; the training job is requeued, judges stay
    judging's time is up, or its node is lost  checkpoint; both are requeued, training held until judges run

A job that ends for good leaves a file named after its ID, with its exit code, and the components of the other job look
for it. The other job's script notices a job that leaves none (``scancel``, a lost node) by querying Slurm. The file
``held`` keeps the training job from starting before the judging job. The scripts are ``templates/pair.sh`` and
``templates/watch_*.sh``.
"""

from __future__ import annotations

import enum
from pathlib import Path


class Part(enum.StrEnum):
    """Part of a run that a job is."""

    run = "run"
    """The whole run in one job."""
    judging = "judging"
    training = "training"


JOBS, ENDED = "jobs", "ended"
"""Folders in ``Spec.shared``: ID of each job by its part; exit code of each job that ended, by its ID."""


def exit_code_of(part: Part) -> str:
    """Return the file in ``JOBS`` with the exit code of the job's component that failed first, if one failed."""
    return f"{part}.exit_code"


def exit_code_of_other(shared: Path, part: Part) -> int | None:
    """Return the exit code of the run's other job; None if it has not ended for good or does not exist."""
    other = Part.judging if part is Part.training else Part.training
    try:
        job = (shared / JOBS / other).read_text(encoding="utf-8").strip()
        return int((shared / ENDED / job).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or being written
        return None
