"""What surrounds the components in a batch script: stops a run in time, requeues the job, and reports failures.

nemo-run inserts these lines where a job's setup goes. They are bash in ``templates/``, in which ``@NAME@`` is replaced.
Slurm sends signals to the script alone (``--signal=B:``): sent to all processes, they would end engines and servers in
the middle of the step that the trainer still has to finish.

nemo-run's script exits with the code of the step that ended first. A trainer that is done and one that stopped as
requested both exit with 0, because srun would end the other ranks on any other code. Trainers therefore leave a file
that tells the two apart, and a job whose trainer left none was terminated early.

A run is one job, or two that watch each other (``slurm.allocation: separate``, see ``slurm_jobs.py``).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from launch.slurm_jobs import ENDED, JOBS, Part, exit_code_of
from launch.spec import DONE, SHARED, STOPPED, UNFINISHED
from megatron_rlpt.errors import BufferUnavailableError, ConfigError, RunStopped, TeacherError
from megatron_rlpt.observe.watchdog import HEARTBEAT, STALLED
from megatron_rlpt.trainer.stop import STOP_FILE

TEMPLATES = Path(__file__).parent / "templates"
_TEMPLATES_OF = {
    Part.run: ("job", "begin_training", "exit"),
    Part.judging: ("job", "begin_judging", "exit", "pair", "watch_training"),
    Part.training: ("job", "begin_training", "exit", "pair", "watch_judging"),
}
_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
_INTERVAL = 5
"""Seconds between two queries of Slurm about the other job of a pair."""


def setup_lines(
    run_dir: str, part: Part, *, requeue: bool, modules: Sequence[str] = (), setup: Sequence[str] = ()
) -> str:
    """Return the lines that surround the components of a batch script.

    Args:
        run_dir: folder of the run as the node knows it, shared by all nodes.
        part: the job's part in the run.
        requeue: requeue the job when the run stopped because it was requested to.
        modules: environment modules to load.
        setup: lines of the site or the user to run after that.
    """
    values = {
        "RUN": shlex.quote(str(PurePosixPath(run_dir))),
        "PART": part,
        "REQUEUE": "yes" if requeue else "no",
        "SHARED": SHARED,
        "JOBS": JOBS,
        "ENDED": ENDED,
        "EXIT_CODE_FILE": exit_code_of(part),
        "DONE": DONE,
        "STOPPED": STOPPED,
        "STOP_FILE": STOP_FILE,
        "HEARTBEAT": HEARTBEAT,
        "STOPPED_CODE": str(RunStopped.exit_code),
        "TERMINATED_CODE": str(UNFINISHED),
        "STALLED_CODE": str(STALLED),
        "NO_BUFFER_CODE": str(BufferUnavailableError.exit_code),
        "NO_TEACHER_CODE": str(TeacherError.exit_code),
        "INTERVAL": str(_INTERVAL),
    }
    lines = [_render(name, values) for name in _TEMPLATES_OF[part]]
    if not requeue:
        lines.append(_render("no_requeue", values))
    return "\n".join([*lines, *site_lines(modules, setup)])


def site_lines(modules: Sequence[str], setup: Sequence[str]) -> list[str]:
    """Return lines that load ``modules`` and run ``setup``.

    The shell exits with 2 at the first that fails, and names it, after that line's own output.
    """

    def checked(command: str, key: str, what: str) -> str:
        error = shlex.quote(f"error: {key} of the cluster file: {what} failed on ")
        return f'{command} || {{ echo {error}"$(hostname)"; exit {ConfigError.exit_code}; }}'

    lines = [_render("modules", {})] if modules else []
    lines += [checked(f"module load {shlex.quote(name)}", "modules", f"module load {name}") for name in modules]
    # eval: a line that bash cannot parse fails and is named; otherwise bash would reject the whole script.
    return lines + [checked(f"eval {shlex.quote(line)}", "setup", line) for line in setup]


def _render(name: str, values: Mapping[str, str]) -> str:
    text = (TEMPLATES / f"{name}.sh").read_text(encoding="utf-8")
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text).rstrip("\n")
