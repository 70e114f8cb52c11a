"""All components of a run on this machine, until the trainer is done or a component cannot be kept running.

    python -m launch.local SPEC

Does what ``srun`` and the batch script do on a cluster: starts all components, ends the others when one ends, and exits
with its code. On Ctrl-C or SIGTERM the trainer writes a checkpoint and stops; a second signal ends everything
immediately. ``rlpt launch`` starts this through nemo-run and follows the trainer's log.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from launch.slurm_jobs import JOBS
from launch.spec import DONE, SILENT, STOPPED, UNFINISHED, Spec, publish, read_published, read_reports
from megatron_rlpt.distributed.addresses import free_port
from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.distributed.processes import EndRequest, Supervisor, exit_code_of
from megatron_rlpt.errors import ConfigError, RunStopped
from megatron_rlpt.trainer.stop import STOP_FILE

RUNNING, OUTCOME = "local.json", "outcome.json"
"""Files in ``Spec.shared``: the process of ``run_all``, and its exit code once it has ended."""
_POLL = 0.2
_START = 60.0
"""Seconds that a process has to start."""
_GRACE = 75.0
"""Seconds that components have to end; longer than their commands have."""
_HURRY = 5.0
"""The same after a second signal."""


def run_all(spec: Spec, spec_file: Path) -> int:
    """Run all components of ``spec``.

    Returns:
        The trainer's exit code, that of the component that ended before it, or 130 after two signals.
    """
    request = EndRequest()
    request.listen()
    supervisor = Supervisor()
    start = uuid.uuid4().hex
    publish(spec.shared / RUNNING, {"holder": str(Holder.me())})
    try:
        for role, command, variables in _commands(spec, spec_file, start):
            # A component restarts its own command; if the component itself ends, something is wrong.
            environment = {**os.environ, **variables}
            supervisor.start(role, command, restart_on=lambda returncode: False, env=environment)
        code = _supervise(supervisor, spec, request)
        if code == 0 and not (spec.shared / DONE).exists():
            code = RunStopped.exit_code if (spec.shared / STOPPED).exists() else UNFINISHED
    finally:
        supervisor.end(_HURRY if request.times > 1 else _GRACE)
        if request.times > 1:
            _kill_commands(spec, start)
    publish(spec.shared / OUTCOME, {"exit_code": code})
    return code


def _supervise(supervisor: Supervisor, spec: Spec, request: EndRequest) -> int:
    stop_requested = False

    def interrupted(seconds: float) -> bool:
        nonlocal stop_requested
        if request.wait(seconds) and not stop_requested:
            print("stopping after this step with a checkpoint; Ctrl-C again ends everything immediately", flush=True)
            (Path(spec.run_dir) / STOP_FILE).touch()
            stop_requested = True
        return request.times > 1

    # A rank that is done must not end those that are still writing.
    ranks = spec.ranks_per_node
    while ranks and (end := supervisor.run(interrupted)) is not None:
        if end.child.name != "trainer" or end.returncode:
            return exit_code_of(end.returncode)
        ranks -= 1
    return 130 if ranks else 0


def await_outcome(spec: Spec) -> int:
    """Return the exit code of ``run_all`` in another process, which has just been started.

    nemo-run reports only success or failure, and may report the end of a process that is still running.

    Raises:
        ConfigError: it did not start, or ended without an exit code.
    """
    deadline = time.monotonic() + _START
    while not (spec.shared / OUTCOME).exists():
        if _running(spec) is None and time.monotonic() > deadline and not (spec.shared / OUTCOME).exists():
            raise ConfigError(f"the components did not start, or were killed; see the output above and {spec.logs}")
        time.sleep(_POLL)
    return int(read_published(spec.shared / OUTCOME, exit_code=int).get("exit_code", UNFINISHED))


@contextlib.contextmanager
def following_trainer(spec: Spec, output: TextIO) -> Iterator[None]:
    """Print to ``output`` what the trainer's first rank writes to its log meanwhile."""
    log = spec.logs / "trainer-00000.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    done = threading.Event()

    def follow() -> None:
        with log.open(encoding="utf-8", errors="replace") as lines:
            lines.seek(0, os.SEEK_END)
            last = False
            while not last:
                last = done.wait(_POLL)
                if text := lines.read():
                    output.write(text)
                    output.flush()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def clear_earlier(spec: Spec) -> None:
    """Remove what an earlier launch of the run left behind.

    Raises:
        ConfigError: an earlier launch is still running, or the run's folder cannot be written.
    """
    holder = _running(spec)
    if holder is not None:
        raise ConfigError(
            f"{spec.run_dir} is in use by {holder.describe()}; end it first (kill {holder.pid}), or set another run.dir"
        )
    try:
        spec.shared.mkdir(parents=True, exist_ok=True)
        for name in (RUNNING, OUTCOME, DONE, STOPPED, "buffer.json", "judged.json"):
            (spec.shared / name).unlink(missing_ok=True)
        (Path(spec.run_dir) / STOP_FILE).unlink(missing_ok=True)
        for name in (JOBS, "failed"):
            shutil.rmtree(spec.shared / name, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"run.dir {spec.run_dir} cannot be written: {error.strerror}; set another") from None


@contextlib.contextmanager
def passing_on_signals(spec: Spec) -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the components, which nemo-run starts in a session of their own.

    Once they have ended, signals are ignored until this process ends: they would only interrupt nemo-run's clean-up.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        if (spec.shared / OUTCOME).exists():
            return
        holder = _running(spec)
        if holder is None:
            raise KeyboardInterrupt
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGTERM)

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


def _running(spec: Spec) -> Holder | None:
    """Return the process of ``run_all``, if it is running."""
    holder = Holder.parse(read_published(spec.shared / RUNNING, holder=str).get("holder", ""))
    if holder is None or (spec.shared / OUTCOME).exists():
        return None
    alive = holder.is_alive()
    if alive is None:  # on another machine: judge by the reports of its components
        reports = read_reports(spec.shared, time=float | int)
        alive = any(time.time() - report["time"] < SILENT for report in reports)
    return holder if alive else None


def _kill_commands(spec: Spec, start: str) -> None:
    """Kill the commands of this start's components: a trainer would finish its step first, which may take minutes."""
    for report in read_reports(spec.shared, start=str, state=str, pid=int):
        if report["start"] == start and report["state"] == "running" and report["pid"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(report["pid"], signal.SIGKILL)


def _commands(spec: Spec, spec_file: Path, start: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """Return role, command and variables of every process, in the order of their start."""
    port = str(free_port())
    gpus = _gpus(spec)
    commands: list[tuple[str, list[str], dict[str, str]]] = []
    for role in spec.components:
        count = spec.servers[role].per_node if role in spec.servers else 1
        count = spec.ranks_per_node if role == "trainer" else count
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
    """Return the GPUs of the trainer and of the servers, which share the machine; empty if none are requested."""
    needed = {"trainer": spec.trainer_gpus}
    needed |= {role: server.per_node * server.gpus for role, server in spec.servers.items()}
    total = sum(needed.values())
    if not total:
        return {}
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(total)))).split(",")
    found, first = {}, 0
    for role, count in needed.items():
        found[role] = visible[first : first + count]
        first += count
    return found


def main() -> int:
    """Run all components."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    arguments = parser.parse_args()
    return run_all(Spec.read(arguments.spec), arguments.spec.resolve())


if __name__ == "__main__":
    sys.exit(main())
