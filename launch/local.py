"""All components of a run on this machine, until the trainer is done or one of them cannot be kept going.

    python -m launch.local SPEC

What ``srun`` and the batch script do on a cluster: starts every component, ends the others when one ends, and leaves
with its exit code. Ctrl-C and SIGTERM ask the trainer for a checkpoint; a second one ends everything at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from launch.slurm_jobs import JOBS
from launch.spec import DONE, SILENT, STOPPED, UNFINISHED, Spec, publish, read_published, said_by_components
from megatron_rlpt.distributed.addresses import free_port
from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.distributed.processes import EndRequest, end_all, start_child
from megatron_rlpt.errors import ConfigError, RunStopped
from megatron_rlpt.trainer.stop import STOP_FILE

RUNNING, OUTCOME = "local.json", "outcome.json"
"""Files in ``Spec.shared`` with this process's number, and in the end with the exit code."""
_POLL = 0.2
_START = 60.0
"""Seconds that a process has to come up."""
_GRACE = 75.0
"""Seconds that components have to end; more than they give to their commands."""
_HURRY = 5.0
"""The same when everything is to end at once."""


def run_all(spec: Spec, spec_file: Path) -> int:
    """Run all components of ``spec``; the trainer's exit code, or that of what ended before it; 130 after Ctrl-C."""
    told = EndRequest()
    told.listen()
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    start = uuid.uuid4().hex
    publish(spec.shared / RUNNING, {"holder": str(Holder.me())})
    try:
        for role, command, variables in _commands(spec, spec_file, start):
            running.append((role, start_child(command, env={**os.environ, **variables})))
        code = _await_end(running, Path(spec.run_dir) / STOP_FILE, told)
        if code == 0 and not (spec.shared / DONE).exists():
            code = RunStopped.exit_code if (spec.shared / STOPPED).exists() else UNFINISHED
    finally:
        end_all([process for _, process in running], _HURRY if told.times > 1 else _GRACE)
        if told.times > 1:
            _kill_commands(spec, start)
    publish(spec.shared / OUTCOME, {"exit_code": code})
    return code


def await_outcome(spec: Spec) -> int:
    """Exit code of ``run_all`` in another process, which has just been started.

    nemo-run knows of success and failure only, and takes a process for ended that is not.

    Raises:
        ConfigError: it did not start, or ended without one.
    """
    deadline = time.monotonic() + _START
    while not (spec.shared / OUTCOME).exists():
        if _running(spec) is None and time.monotonic() > deadline and not (spec.shared / OUTCOME).exists():
            raise ConfigError(f"the components did not start, or were killed; look above and at {spec.logs}")
        time.sleep(_POLL)
    return int(read_published(spec.shared / OUTCOME, exit_code=int).get("exit_code", UNFINISHED))


def forget_earlier(spec: Spec) -> None:
    """Before a start: what an earlier one left behind is none of it.

    Raises:
        ConfigError: an earlier one is still running, or the run's folder cannot be written.
    """
    holder = _running(spec)
    if holder is not None:
        raise ConfigError(
            f"{spec.run_dir} is being run by {holder.describe()}; end it first (kill {holder.pid}), or choose another"
        )
    try:
        spec.shared.mkdir(parents=True, exist_ok=True)
        for name in (RUNNING, OUTCOME, DONE, STOPPED, "buffer.json", "judged.json"):
            (spec.shared / name).unlink(missing_ok=True)
        (Path(spec.run_dir) / STOP_FILE).unlink(missing_ok=True)
        for name in (JOBS, "failed"):
            shutil.rmtree(spec.shared / name, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"run.dir {spec.run_dir} cannot be written: {error.strerror}; choose another") from None


@contextlib.contextmanager
def passing_on_signals(spec: Spec) -> Iterator[None]:
    """Ctrl-C and SIGTERM go on to the components meanwhile, which nemo-run starts in a session of their own."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        holder = _running(spec)
        if holder is None:
            raise KeyboardInterrupt
        os.kill(holder.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _running(spec: Spec) -> Holder | None:
    """The process of ``run_all``, while there is one."""
    holder = Holder.parse(read_published(spec.shared / RUNNING, holder=str).get("holder", ""))
    if holder is None or (spec.shared / OUTCOME).exists():
        return None
    alive = holder.is_alive()
    if alive is None:  # on another machine, by the words of its components
        said = said_by_components(spec.shared, time=float | int)
        alive = any(time.time() - component["time"] < SILENT for component in said)
    return holder if alive else None


def _kill_commands(spec: Spec, start: str) -> None:
    """End what the killed components of this start ran: a trainer would finish its step, which may take minutes."""
    for said in said_by_components(spec.shared, start=str, state=str, pid=int):
        if said["start"] == start and said["state"] == "running" and said["pid"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(said["pid"], signal.SIGKILL)


def _commands(spec: Spec, spec_file: Path, start: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """Role, command and variables of every process; in the order in which they are started."""
    port = str(free_port())
    gpus = _gpus(spec)
    commands: list[tuple[str, list[str], dict[str, str]]] = []
    for role in spec.components:
        count = {"trainer": spec.ranks_per_node, "teacher": spec.servers_per_node}.get(role, 1)
        for number in range(count):
            variables = {"RLPT_START": start, "RLPT_TASK": str(number)}
            if role == "trainer" and count > 1:
                variables |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
                variables |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if role in gpus:
                variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[role])
            command = [sys.executable, "-m", "launch.component", role, str(spec_file)]
            commands.append((role, command, variables))
    return commands


def _gpus(spec: Spec) -> dict[str, list[str]]:
    """GPUs of the trainer and of the servers, which share the machine; nothing where none are asked for."""
    servers = spec.servers_per_node * spec.server_gpus if "teacher" in spec.components else 0
    if not spec.trainer_gpus + servers:
        return {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(spec.trainer_gpus + servers)))
    visible = named.split(",")
    return {"trainer": visible[: spec.trainer_gpus], "teacher": visible[spec.trainer_gpus :][:servers]}


def _await_end(running: Sequence[tuple[str, subprocess.Popen[bytes]]], stop_file: Path, told: EndRequest) -> int:
    asked = False
    while not (told.wait(_POLL) and told.times > 1):
        if told.is_set() and not asked:
            print("asking the trainer for a checkpoint; Ctrl-C once more ends everything at once", flush=True)
            stop_file.touch()
            asked = True
        ends = [(role, process.poll()) for role, process in running]
        for role, code in ends:
            if code is not None and (role != "trainer" or code):
                return code if code > 0 else 128 - code
        # A rank that is done must not end those that still write.
        ranks = [code for role, code in ends if role == "trainer"]
        if all(code is not None for code in ranks):
            return max(code for code in ranks if code is not None)
    return 130


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    arguments = parser.parse_args()
    return run_all(Spec.read(arguments.spec), arguments.spec.resolve())


if __name__ == "__main__":
    sys.exit(main())
