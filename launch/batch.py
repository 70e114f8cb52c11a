"""What a batch script does around its components, in bash: asks for a checkpoint in time, queues itself again, and says
at its end what failed.

It stands where nemo-run puts the set-up of a job. Signals of Slurm go to the script alone (``--signal=B:``): sent to
all processes, they would end engines and servers in the middle of the step that is to be finished.

nemo-run's script ends with the exit code of the step that ended first. That of a trainer which is done is 0, and so is
that of one which stopped as asked: srun would end its other ranks otherwise. So trainers leave a file that says which,
and a job whose trainer left none was ended before it was done.

A run is one job, or two (``slurm.allocation: separate``) that look after each other (``pair.py``).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from launch import slurm_jobs as pair
from launch.slurm_jobs import Part
from launch.spec import DONE, SHARED, STOPPED, UNFINISHED
from megatron_rlpt.errors import ConfigError, RunStopped
from megatron_rlpt.observe.watchdog import HEARTBEAT, STALLED
from megatron_rlpt.trainer.stop import STOP_FILE

_LINES = """\
# Nothing below is to be traced: traces go to logs.
{{ set +vx; }} 2>/dev/null
export RLPT_START="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"
rlpt_run={run}
rlpt_shared="$rlpt_run/{shared}"
rlpt_jobs="$rlpt_shared/{jobs}"
mkdir -p "$rlpt_shared/failed" "$rlpt_jobs"
readlink "/proc/$$/fd/1" >"$rlpt_jobs/{part}.output"
rm -f "$rlpt_jobs/{exit_code}"
{begin}
rlpt_again() {{ {again}; }}
rlpt_finish() {{
    local code=$?
    trap - EXIT
    set +e
    # The first that failed comes last: it is what the others failed of.
    for name in $(ls -t "$rlpt_shared/failed"); do cat "$rlpt_shared/failed/$name"; done
    if [ "$code" != 0 ] && [ -s "$rlpt_jobs/{exit_code}" ]; then code=$(cat "$rlpt_jobs/{exit_code}"); fi
{finish}
    exit "$code"
}}
trap rlpt_finish EXIT"""

_BEGIN_JUDGING = 'rm -f "$rlpt_shared"/failed/{buffer,teacher,judges}-* "$rlpt_shared/buffer.json"'

_BEGIN_TRAINING = """\
rm -f {old} "$rlpt_shared"/{{judged.json,{done},{stopped}}} "$rlpt_run/{stop}"
rlpt_step() {{ sed -n 's/.*"step": \\([0-9]*\\).*/\\1/p' "$rlpt_run/{heartbeat}" 2>/dev/null || echo 0; }}
rlpt_said() {{ [ "$(cat "$rlpt_shared/$1" 2>/dev/null)" = "$RLPT_START" ]; }}
rlpt_began=$(rlpt_step)
rlpt_ask_to_stop() {{
    echo "$1: asking for a checkpoint"
    touch "$rlpt_run/{stop}"
}}
trap 'rlpt_ask_to_stop "the time is nearly up"' USR1
trap 'rlpt_told=1; rlpt_ask_to_stop "told to end"' TERM"""

_OLD = {
    Part.run: '"$rlpt_shared"/failed/* "$rlpt_shared/buffer.json"',
    Part.training: '"$rlpt_shared"/failed/trainer-*',
}

_HOW_TRAINING_ENDED = """\
    if [ "$code" = 0 ] && ! rlpt_said {done}; then
        if rlpt_said {stopped}; then
            code={again}
        else
            echo "error: the trainer was ended before it was done"
            code={terminated}
        fi
    fi
    if [ -n "${{rlpt_told:-}}" ] && [ "$code" = {again} ]; then
        echo "stopped as the job was told to end; launch it once more to go on"
        code={terminated}
    fi
"""

# One start without a step is bad luck, two are a time that is too short, and there would be a third.
_IF_STOPPED = """\
    if [ "$code" != {again} ] || [ "$(rlpt_step)" != "$rlpt_began" ]; then
        rm -f "$rlpt_shared/idle"
    elif [ ! -e "$rlpt_shared/idle" ]; then
        touch "$rlpt_shared/idle"
    else
        rm -f "$rlpt_shared/idle"
        echo "error: stopped twice before the first step of a start; raise slurm.time or lower slurm.stop_lead"
        code={stalled}
    fi
    if [ "$code" = {again} ]; then rlpt_again; fi
"""

_DEFINE_MODULE = """\
if ! command -v module >/dev/null; then
    for file in /etc/profile.d/{modules,lmod,z00_lmod,00-modulepath}.sh /usr/share/{modules,lmod/lmod}/init/bash; do
        if [ -r "$file" ]; then . "$file"; fi
    done
fi"""

_AGAIN = 'echo "queued again"; scontrol "requeue${rlpt_hold:-}" "${SLURM_HET_JOB_ID:-$SLURM_JOB_ID}"'
_NOT_AGAIN = 'echo "stopped; launch it once more to go on"'


def setup_lines(
    run_dir: str, part: Part, *, requeue: bool, modules: Sequence[str] = (), setup: Sequence[str] = ()
) -> str:
    """Lines for the batch script.

    Args:
        run_dir: folder of the run as the node knows it, which all nodes share.
        part: what the job is of the run.
        requeue: queue the job again when the run stopped because it was asked to.
        modules: environment modules to load.
        setup: lines of the site's or the user's, to run after that.
    """
    codes = {"again": RunStopped.exit_code, "terminated": UNFINISHED, "stalled": STALLED}
    names = {"done": DONE, "stopped": STOPPED, "stop": STOP_FILE, "heartbeat": HEARTBEAT}
    ended = _HOW_TRAINING_ENDED.format(**codes, **names)
    stopped = _IF_STOPPED.format(**codes)
    if part is Part.judging:
        begin, finish = _BEGIN_JUDGING, pair.finish_judging(requeue=requeue)
    else:
        begin = _BEGIN_TRAINING.format(old=_OLD[part], **names)
        finish = ended + (stopped if part is Part.run else pair.finish_training(stopped, requeue=requeue))
    lines = _LINES.format(
        run=shlex.quote(str(PurePosixPath(run_dir))),
        shared=SHARED,
        part=part,
        jobs=pair.JOBS,
        exit_code=pair.exit_code_of(part),
        begin=begin,
        again=_AGAIN if requeue else _NOT_AGAIN,
        finish=finish.rstrip("\n"),
    )
    if part is not Part.run:
        lines += "\n" + pair.watch_lines(part)
    if not requeue:
        # Slurm also queues a job again whose node has failed; only the job itself can tell it not to.
        lines += '\nscontrol update JobId="$SLURM_JOB_ID" Requeue=0'
    return "\n".join([lines, *site_lines(modules, setup)])


def site_lines(modules: Sequence[str], setup: Sequence[str]) -> list[str]:
    """Lines that load ``modules`` and run ``setup``; the shell ends with 2 at the first that fails, and says which.

    What a failing line itself says comes before that.
    """

    def checked(command: str, key: str, what: str) -> str:
        said = shlex.quote(f"error: {key} of the cluster file: {what} failed on ")
        return f'{command} || {{ echo {said}"$(hostname)"; exit {ConfigError.exit_code}; }}'

    # Shells that are not login shells have no such command where the site defines it for those alone.
    lines = [_DEFINE_MODULE] if modules else []
    lines += [checked(f"module load {shlex.quote(name)}", "modules", f"module load {name}") for name in modules]
    # Evaluated, so that a line which is no bash is one that fails, and names itself; not the whole script.
    return lines + [checked(f"eval {shlex.quote(line)}", "setup", line) for line in setup]
