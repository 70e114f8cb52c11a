"""Judging and training as two jobs that look after each other (``slurm.allocation: separate``).

    judging job   buffer, servers of the teacher, judge workers   starts first
    training job  the trainer's ranks                             starts after it (``--dependency=after``)

    what happens                               what follows
    -----------------------------------------  ------------------------------------------------------------------
    training is over, failed or was cancelled  the judging job ends
    judging failed or was cancelled            checkpoint; the training job ends with the exit code of the other
    training's time is up                      checkpoint; the training job is queued again, judges stay
    judging's time is up, or its node is lost  checkpoint; both are queued again, training held until judges run

Each job leaves a file named after its number, with its exit code, when it has ended for good; the components of the
other one look for it. A job that ended without leaving one (``scancel``, a lost node) is missed by the other's script,
which asks Slurm. ``held`` says that the training job waits for the judging job and may not start before it.
"""

from __future__ import annotations

import enum
from pathlib import Path


class Part(enum.StrEnum):
    """What a job is of a run."""

    run = "run"
    """All of it."""
    judging = "judging"
    training = "training"


JOBS, ENDED = "jobs", "ended"
"""Folders in ``Spec.shared``: number of each job by its part; exit code of each job that has ended, by its number."""


def exit_code_of(part: Part) -> str:
    """File in ``JOBS`` with the exit code of the component of a job that failed first; not there where none has."""
    return f"{part}.exit_code"


def exit_code_of_other(shared: Path, part: Part) -> int | None:
    """How the other job of ``part``'s run has ended for good; None while it has not, or where there is none."""
    other = Part.judging if part is Part.training else Part.training
    try:
        job = (shared / JOBS / other).read_text(encoding="utf-8").strip()
        return int((shared / ENDED / job).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or just being written
        return None
