"""What a batch script does around its components, in bash: asks for a checkpoint in time, queues itself again, and says
at its end what failed.

It stands where nemo-run puts the set-up of a job. Signals of Slurm go to the script alone (``--signal=B:``): sent to
all processes, they would end engines and servers in the middle of the step that is to be finished.

A run is one job, or two (``slurm.allocation: separate``) that look after each other (``pair.py``).
"""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from launch import pair
from launch.pair import Part
from megatron_rlpt.errors import RunStopped
from megatron_rlpt.stopping import STOP_FILE

_LINES = """\
# Nothing below is to be traced: traces go to logs.
{{ set +vx; }} 2>/dev/null
export RLPT_START="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"
rlpt_shared={shared}
rlpt_stop={stop}
mkdir -p "$rlpt_shared/failed"
{begin}
rlpt_ask_to_stop() {{
    echo "the time is nearly up: asking for a checkpoint"
    touch "$rlpt_stop"
}}
rlpt_again() {{
    {again}
}}
rlpt_finish() {{
    local code=$?
    trap - EXIT
    set +e
    cat "$rlpt_shared"/failed/* 2>/dev/null
    {finish}
    exit "$code"
}}
trap rlpt_ask_to_stop USR1
trap rlpt_finish EXIT"""

_BEGIN = {
    Part.judging: 'rm -f "$rlpt_shared"/failed/{buffer,teacher,judges}-*',
    Part.training: 'rm -f "$rlpt_shared"/failed/trainer-* "$rlpt_shared/judged.json" "$rlpt_stop"',
    Part.run: 'rm -f "$rlpt_shared"/failed/* "$rlpt_shared/judged.json" "$rlpt_stop"',
}
_AGAIN = 'echo "queued again"; scontrol "requeue${rlpt_hold:-}" "${SLURM_HET_JOB_ID:-$SLURM_JOB_ID}"'
_NOT_AGAIN = 'echo "stopped; launch it once more to go on"'
_FINISH = f'if [ "$code" = {RunStopped.exit_code} ]; then rlpt_again; fi'


def setup_lines(run_dir: str, part: Part, *, requeue: bool) -> str:
    """Lines for the batch script.

    Args:
        run_dir: folder of the run, which all nodes share.
        part: what the job is of the run.
        requeue: queue the job again when the run stopped because it was asked to.
    """
    folder = PurePosixPath(run_dir)
    lines = _LINES.format(
        shared=shlex.quote(str(folder / "cluster")),
        stop=shlex.quote(str(folder / STOP_FILE)),
        begin=_BEGIN[part],
        again=_AGAIN if requeue else _NOT_AGAIN,
        finish=_FINISH if part is Part.run else pair.finish_lines(part, requeue=requeue),
    )
    if part is not Part.run:
        lines += "\n" + pair.watch_lines(part)
    # Slurm also queues a job again whose node has failed; only the job itself can tell it not to.
    return lines if requeue else f'{lines}\nscontrol update JobId="$SLURM_JOB_ID" Requeue=0'
