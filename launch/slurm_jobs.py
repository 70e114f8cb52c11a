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

from megatron_rlpt.errors import BufferUnavailableError, RunStopped, TeacherError
from megatron_rlpt.trainer.stop import STOP_FILE


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


_BEGIN = """\
mkdir -p "$rlpt_shared/ended"
rm -f "$rlpt_shared/ended/$SLURM_JOB_ID"
rlpt_job() {{ cat "$rlpt_shared/jobs/$1" 2>/dev/null; }}
# State of the job of a part, "gone" once Slurm has it no more; nothing where that cannot be told now.
rlpt_state() {{
    local job said
    job=$(rlpt_job "$1") || return
    if said=$(squeue --noheader --format=%T --jobs="$job" 2>&1); then
        echo "${{said:-gone}}"
    elif [[ $said == *"Invalid job id"* ]]; then
        echo gone
    fi
}}
rlpt_ended() {{ [ -e "$rlpt_shared/ended/$1" ] || echo "$2" >"$rlpt_shared/ended/$1"; }}
"""

_WATCH = {
    Part.judging: """\
rm -f "$rlpt_shared/handover"
# The trainer goes first, while it still has judges; then this job leaves as well.
trap 'echo "the time is nearly up: the trainer is asked to stop"; touch "$rlpt_shared/handover" "$rlpt_run/{stop}"' USR1
trap 'exit {again}' USR2
rlpt_watch() {{
    while sleep {every}; do
        case $(rlpt_state training) in
        gone) rlpt_ended "$(rlpt_job training)" 0 ;;
        PENDING | REQUEUE*)
            if [ -e "$rlpt_shared/handover" ]; then
                touch "$rlpt_shared/held"
                scontrol hold "$(rlpt_job training)"
                kill -USR2 $$
            elif [ -e "$rlpt_shared/held" ]; then
                scontrol release "$(rlpt_job training)" && rm -f "$rlpt_shared/held"
            fi
            ;;
        esac
    done
}}
""",
    Part.training: """\
rlpt_watch() {{
    while sleep {every}; do
        case $(rlpt_state judging) in
        gone) rlpt_ended "$(rlpt_job judging)" {no_teacher} ;;
        PENDING | REQUEUE*) touch "$rlpt_run/{stop}" ;;
        esac
    done
}}
""",
}

_HANDOVER = """\
    case $(rlpt_state judging) in PENDING | REQUEUE*) touch "$rlpt_shared/handover" ;; esac
    if [ -e "$rlpt_shared/handover" ]; then
        # A buffer that went with its job is no failure of the run, which goes on from its last checkpoint.
        [ "$code" != {no_buffer} ] || code={again}
        [ "$code" != {again} ] || {{ touch "$rlpt_shared/held"; rlpt_hold=hold; }}
    fi
"""

_END = """\
    kill "$rlpt_watching" 2>/dev/null
    {unless_again}rlpt_ended "$SLURM_JOB_ID" "$code"
"""

_EVERY = 5
"""Seconds between two questions to Slurm about the other job."""


def watch_lines(part: Part) -> str:
    """Lines that look after the other job in the background while this one runs."""
    lines = _BEGIN + _WATCH[part] + "rlpt_watch &\nrlpt_watching=$!"
    return lines.format(every=_EVERY, again=RunStopped.exit_code, no_teacher=TeacherError.exit_code, stop=STOP_FILE)


def finish_judging(*, requeue: bool) -> str:
    """Lines at the end of the judging job, which has ended with ``$code``."""
    return f'    if [ "$code" = {RunStopped.exit_code} ]; then rlpt_again; fi\n' + _end(requeue)


def finish_training(if_stopped: str, *, requeue: bool) -> str:
    """Lines at the end of the training job, which has ended with ``$code``; ``if_stopped`` queues it again."""
    codes = {"again": RunStopped.exit_code, "no_buffer": BufferUnavailableError.exit_code}
    return _HANDOVER.format(**codes) + if_stopped + _end(requeue)


def _end(requeue: bool) -> str:
    # A stopped job that is queued again has not ended.
    return _END.format(unless_again=f'[ "$code" = {RunStopped.exit_code} ] || ' if requeue else "")


def exit_code_of_other(shared: Path, part: Part) -> int | None:
    """How the other job of ``part``'s run has ended for good; None while it has not, or where there is none."""
    other = Part.judging if part is Part.training else Part.training
    try:
        job = (shared / JOBS / other).read_text(encoding="utf-8").strip()
        return int((shared / ENDED / job).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or just being written
        return None
