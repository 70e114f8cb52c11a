"""What a batch script does around its components, in bash: asks for a checkpoint in time, queues itself again, and says
at its end what failed.

It stands where nemo-run puts the set-up of a job. Signals of Slurm go to the script alone (``--signal=B:``): sent to
all processes, they would end engines and servers in the middle of the step that is to be finished.
"""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from megatron_rlpt.errors import RunStopped
from megatron_rlpt.stopping import STOP_FILE

_LINES = """\
# Nothing below is to be traced: traces go to logs.
{{ set +vx; }} 2>/dev/null
export RLPT_START="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"
mkdir -p {shared}
rm -rf {shared}/failed {shared}/judged.json {stop}
trap 'echo "the time is nearly up: asking for a checkpoint"; touch {stop}' USR1
rlpt_finish() {{
    local code=$?
    trap - EXIT
    set +e
    cat {shared}/failed/* 2>/dev/null
    if [ "$code" = {stopped} ]; then
        {again}
    fi
    exit "$code"
}}
trap rlpt_finish EXIT"""

_AGAIN = 'echo "queued again"; scontrol requeue "${SLURM_HET_JOB_ID:-$SLURM_JOB_ID}"'
_NOT_AGAIN = 'echo "stopped; launch it once more to go on"'


def setup_lines(run_dir: str, *, requeue: bool) -> str:
    """Lines for the batch script.

    Args:
        run_dir: folder of the run, which all nodes share.
        requeue: queue the job again when the run stopped because it was asked to.
    """
    folder = PurePosixPath(run_dir)
    lines = _LINES.format(
        shared=shlex.quote(str(folder / "cluster")),
        stop=shlex.quote(str(folder / STOP_FILE)),
        stopped=RunStopped.exit_code,
        again=_AGAIN if requeue else _NOT_AGAIN,
    )
    # Slurm also queues a job again whose node has failed; only the job itself can tell it not to.
    return lines if requeue else f'{lines}\nscontrol update JobId="$SLURM_JOB_ID" Requeue=0'
