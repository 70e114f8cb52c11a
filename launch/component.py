"""One component of a run on its node: waits for what it needs, starts its command, and supervises it.

    python -m launch.component ROLE SPEC

    buffer    Redis; publishes its address                          restarted
    teacher   waits for the buffer, then ``rlpt teacher serve``     restarted
    judges    waits for the buffer, then ``rlpt judge serve``       restarted
    trainer   waits for a first judgment, then ``rlpt train``       restarted after a crash with ``trainer.restart``

A component that receives a signal ends, but not before the trainer of its job: the step in progress needs judges and
buffer. A component that cannot be kept running exits with the code of its command and leaves the end of its log in
``cluster/failed``; its launcher then ends the others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from launch.gate import await_buffer, await_judgment
from launch.slurm_jobs import JOBS, Part, exit_code_of_other
from launch.slurm_jobs import exit_code_of as exit_code_file_of
from launch.spec import (
    DONE,
    OVER,
    SILENT,
    STATUS,
    STOPPED,
    Spec,
    generated_secret,
    publish,
    read_reports,
    read_secrets,
    write_private,
)
from megatron_rlpt.distributed.addresses import LOOPBACK, free_port
from megatron_rlpt.distributed.processes import Child, EndReason, EndRequest, Supervisor, exit_code_of
from megatron_rlpt.errors import ConfigError, RlptError, RunStopped, TeacherError
from megatron_rlpt.observe.terminal import say
from megatron_rlpt.observe.watchdog import STALLED
from megatron_rlpt.plain_text import one_line, plain
from megatron_rlpt.trainer.stop import STOP_FILE

TRAINER = "trainer"
RLPT = (sys.executable, "-m", "megatron_rlpt")
BUFFER = "buffer.json"
"""File in ``Spec.shared`` with the address of the buffer."""
PASSWORD = "password"
"""File in ``Spec.shared`` with the password of Redis."""
_POLL = 0.5
_BEAT = 5.0
"""Seconds between two status reports."""
_GRACE = 60.0
"""Seconds that a command has to end after SIGTERM."""
_SIGNALED = 128
"""Exit codes above it name the signal that ended a process."""
_LAST_LINES = 40
"""Lines of a log that are repeated when a component fails."""


@dataclass(frozen=True)
class Task:
    """One process of a role."""

    role: str
    number: int
    """Among all processes of the role."""
    local: int
    """Among those of the role on this node."""
    start: str
    """The start of the job that it belongs to; differs after a requeue."""

    @property
    def name(self) -> str:
        """Return the name used for files."""
        return f"{self.role}-{self.number:05d}"

    @staticmethod
    def here(role: str) -> Task:
        """Return this process's task, from the variables of Slurm or of ``launch.local``."""
        get = os.environ.get
        number = get("RLPT_TASK") or get("SLURM_PROCID") or "0"
        local = get("RLPT_TASK") or get("SLURM_LOCALID") or "0"
        start = get("RLPT_START") or f"{get('SLURM_JOB_ID', '')}.{get('SLURM_RESTART_COUNT', '0')}"
        return Task(role, int(number), int(local), start)


class RunningComponent:
    """A supervised command that reports its status for ``rlpt status``."""

    def __init__(self, spec: Spec, task: Task) -> None:
        """
        Args:
            spec: of the launch.
            task: the process of the role.

        Raises:
            ConfigError: the file of secrets cannot be used.
        """
        self.spec, self.task = spec, task
        self.ending = threading.Event()
        """Set when the component has to end."""
        self.other_job_code: int | None = None
        """Exit code of the run's other job once that has ended for good, which ends this component too."""
        self.environment = {
            **os.environ,
            **spec.environment,
            **spec.generated_secrets(),
            **read_secrets(spec.secrets_file),
        }
        """Variables of its command."""
        self._request, self._closed = EndRequest(), threading.Event()
        self._log = spec.logs / f"{task.name}.log"
        self._state, self._pid, self._since, self._starts = "starting", 0, time.time(), 0
        self._reporting = threading.Lock()

    def __enter__(self) -> RunningComponent:
        """Handle signals and report the status from a thread; main thread only."""
        # Schedulers send SIGUSR1 when the time limit is near, and at some sites both to every process of the job.
        self._request.listen(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self.report("starting")
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    @property
    def part(self) -> Part:
        """Return the job of the run that it belongs to."""
        if not self.spec.separate:
            return Part.run
        return Part.training if self.task.role == TRAINER else Part.judging

    def report(self, state: str, pid: int = 0) -> None:
        """Publish the state for ``rlpt status``."""
        self._state, self._pid = state, pid
        self._publish()

    def must_end(self) -> bool:
        """Return whether it has to end; a trainer also when a stop of the run was requested."""
        return self.ending.is_set() or (self.task.role == TRAINER and self._stop_requested())

    def sleep(self, seconds: float) -> None:
        """Wait ``seconds``, or until the component has to end."""
        self.ending.wait(seconds)

    def run(self, command: Sequence[str], *, service: bool, restart_on: Callable[[int], bool] | None = None) -> int:
        """Run ``command`` until it ends for good or the component has to end.

        Args:
            command: program and arguments.
            service: run until the component has to end: restart the command whenever it ends.
            restart_on: for other commands, whether to restart after this return code; never by default.

        Returns:
            Its exit code, 128 + number for a signal; 0 for a service that ended with the component.

        Raises:
            ConfigError: the program does not exist.
        """
        trainer = self.task.role == TRAINER
        restart = (lambda returncode: True) if service else restart_on or (lambda returncode: False)
        supervisor = Supervisor(on_start=self._report_start, on_restart=self._report_restart)
        try:
            child = supervisor.start(self.task.name, command, restart_on=restart, log=self._log, env=self.environment)
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started on this node: {error.strerror}") from None
        try:
            end = supervisor.run(self.ending.wait)
            if end is None and trainer and child.process.poll() is None:
                # A file, not a signal: the trainer may have received the signal too, and a second ends it immediately.
                (Path(self.spec.run_dir) / STOP_FILE).touch()
                # No time limit: it finishes its step and writes a checkpoint.
                child.process.wait()
        finally:
            supervisor.end(0.0 if trainer else _GRACE)
        code = exit_code_of(child.process.returncode)
        self.report(f"ended with exit code {code}", child.process.pid)
        if end is None:
            return 0 if service else code
        if end.reason is EndReason.too_often:
            print(f"{self.task.name} {end.reason}, last with exit code {code}; see {self._log}", flush=True)
        return code or int(service)

    def fail(self, code: int, why: str = "") -> None:
        """Leave the reason of a failure where the batch script and ``rlpt status`` repeat it."""
        self.report(f"failed with exit code {code}")
        reason = why or _tail(self._log)
        text = plain(
            f"{self.task.name} on {socket.gethostname()} failed with exit code {code}; {self._log} ends with\n{reason}",
            keep="\n\t",
        )
        print(text, flush=True)
        failed, jobs = self.spec.shared / "failed", self.spec.shared / JOBS
        for folder in (failed, jobs):
            folder.mkdir(parents=True, exist_ok=True)
        (failed / self.task.name).write_text(text + "\n", encoding="utf-8")
        # When the first rank that fails ends the others, srun may return the exit code of those.
        with contextlib.suppress(FileExistsError), (jobs / exit_code_file_of(self.part)).open("x") as file:
            file.write(str(code))

    def _stop_requested(self) -> bool:
        return (Path(self.spec.run_dir) / STOP_FILE).exists()

    def _report_start(self, child: Child) -> None:
        self._starts, self._since = child.starts, time.time()
        self.report("running", child.process.pid)

    def _report_restart(self, child: Child, returncode: int, delay: float) -> None:
        code = exit_code_of(returncode)
        print(f"{self.task.name} ended with exit code {code}; restarting in {delay:g} s", flush=True)
        self.report(f"restarting after exit code {code}")

    def _watch(self) -> None:
        """Report the status regularly, and look for reasons to end."""
        due = time.monotonic() + _BEAT
        # Until the very end: a trainer in its last step must not look silent.
        while not self._closed.wait(_POLL):
            if self._request.is_set() and (self.task.role == TRAINER or self.spec.separate or self._trainer_is_over()):
                self.ending.set()
            if time.monotonic() < due:
                continue
            due = time.monotonic() + _BEAT
            self._publish()
            if self.spec.separate and not self.ending.is_set():
                self.other_job_code = exit_code_of_other(self.spec.shared, self.part)
                if self.other_job_code is not None:
                    self.ending.set()

    def _trainer_is_over(self) -> bool:
        """Return whether no rank of this start is training any more; a stopping trainer needs the others until then."""
        reports = read_reports(self.spec.shared, TRAINER, start=str, state=str, time=float | int)
        return not any(
            report["start"] == self.task.start
            and not report["state"].startswith(OVER)
            and time.time() - report["time"] <= SILENT
            for report in reports
        )

    def _publish(self) -> None:
        report = {
            "component": self.task.name,
            "role": self.task.role,
            "state": self._state,
            "host": socket.gethostname(),
            "pid": self._pid,
            "since": self._since,
            "time": time.time(),
            "starts": self._starts,
            "log": str(self._log),
            "start": self.task.start,
        }
        with self._reporting:
            try:
                publish(self.spec.shared / STATUS / f"{self.task.name}.json", report)
            except OSError as error:
                # A hiccup of the file system must not end a run of hours.
                print(f"warning: {self.task.name} cannot write its status: {error}", file=sys.stderr, flush=True)


def run_component(role: str, spec: Spec) -> int:
    """Run one component to its end and return its exit code.

    A trainer that is done and one that stopped as requested both return 0 and leave a file that tells the two apart.
    On any other exit code srun would end the other ranks, which may still be writing.
    """
    task = Task.here(role)
    try:
        component = RunningComponent(spec, task)
    except RlptError as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return error.exit_code
    with component:
        return _run(component)


def _run(component: RunningComponent) -> int:
    role, shared, why = component.task.role, component.spec.shared, ""
    try:
        code = ROLES[role](component)
    except RlptError as error:
        code, why = error.exit_code, f"error: {error}"
    if role == TRAINER and component.other_job_code is not None and code:
        why = f"error: the judging job ended with exit code {component.other_job_code}; see its output"
        code = component.other_job_code or TeacherError.exit_code
    elif code == RunStopped.exit_code or (component.ending.is_set() and (role != TRAINER or code > _SIGNALED)):
        component.report("ended as requested")
        if role == TRAINER and code == RunStopped.exit_code:
            (shared / STOPPED).write_text(component.task.start, encoding="utf-8")
        return 0
    if code:
        component.fail(code, why)
    elif role == TRAINER:
        (shared / DONE).write_text(component.task.start, encoding="utf-8")
    return code


def _buffer(component: RunningComponent) -> int:
    spec = component.spec
    folder = spec.shared / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    port = spec.redis_port or free_port("0.0.0.0")
    password = generated_secret(spec.shared / PASSWORD)
    bind, host = ("127.0.0.1 -::1", LOOPBACK) if spec.one_machine else ("* -::*", socket.gethostname())
    # A file: every user of the node can read command lines.
    write_private(
        folder / "redis.conf",
        f'port {port}\nbind {bind}\nrequirepass {password}\ndir "{folder}"\n'
        'appendonly yes\nappendfsync everysec\nsave ""\n',
    )
    publish(spec.shared / BUFFER, {"url": f"redis://{host}:{port}/0"})
    return component.run(["redis-server", str(folder / "redis.conf")], service=True)


def _server(component: RunningComponent) -> int:
    spec = component.spec
    server = spec.servers[component.task.role]
    overrides = await_buffer(component)
    if gpus := server.gpus:
        first = component.task.local * gpus
        # Of the allocated GPUs, which need not be the first of the node and may have UUIDs for names.
        visible = component.environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(first + gpus)))
        component.environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + gpus])
    command = [*RLPT, "teacher", "serve", "-c", spec.config, "--concurrency", str(server.concurrency)]
    command += ["--role", server.model_role] if server.model_role else []
    command += ["--host", LOOPBACK if spec.one_machine else "0.0.0.0"]
    return component.run([*command, *overrides, *server.arguments], service=True)


def _judges(component: RunningComponent) -> int:
    command = [*RLPT, "judge", "serve", "-c", component.spec.config, "--workers", str(component.spec.judge_workers)]
    return component.run([*command, *await_buffer(component)], service=True)


def _trainer(component: RunningComponent) -> int:
    overrides = await_buffer(component)
    if "judges" in component.spec.components:
        component.report("waiting for a first judgment")
        await_judgment(component, overrides, component.task.number == 0, component.task.start)

    def crashed(returncode: int) -> bool:
        # Other exit codes come with an error that the same start would meet again.
        mendable = returncode < 0 or returncode in (1, STALLED)
        return component.spec.restart_trainer and mendable and not component.must_end()

    return component.run([*RLPT, "train", "-c", component.spec.config, *overrides], service=False, restart_on=crashed)


ROLES: dict[str, Callable[[RunningComponent], int]] = {
    "buffer": _buffer,
    "teacher": _server,
    "rewriter": _server,
    "judges": _judges,
    TRAINER: _trainer,
}


def _tail(log: Path) -> str:
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return "".join(deque(lines, _LAST_LINES)).rstrip()
    except OSError as error:
        return f"(no log: {error.strerror})"


def main() -> int:
    """Run one component."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("spec", type=Path)
    arguments = parser.parse_args()
    return run_component(arguments.role, Spec.read(arguments.spec))


if __name__ == "__main__":
    sys.exit(main())
