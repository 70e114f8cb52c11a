"""One component of a run on its node: waits for what it needs, starts its command, and watches it.

    python -m launch.component ROLE SPEC

    buffer    Redis; says where it answers                          is started again
    teacher   waits for the buffer, then ``rlpt teacher serve``     is started again
    judges    waits for the buffer, then ``rlpt judge serve``       is started again
    trainer   waits for a first judgment, then ``rlpt train``       its exit code is that of the component

A component that is told to end does so at once, but not before the trainer of its job has: a step that is to be
finished needs judges and buffer. A component that cannot be kept going ends with the exit code of its command, its last
words in its log and in ``cluster/failed``; whoever started all of them ends the others then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from launch.gate import await_buffer, await_judgment
from launch.slurm_jobs import JOBS, Part, exit_code_of, exit_code_of_other
from launch.spec import (
    DONE,
    OVER,
    SILENT,
    STATUS,
    STOPPED,
    Spec,
    made_up,
    publish,
    read_secrets,
    said_by_components,
    write_private,
)
from megatron_rlpt.distributed.addresses import LOOPBACK, free_port
from megatron_rlpt.distributed.processes import EndRequest, Restarts, end_all, start_child
from megatron_rlpt.errors import ConfigError, RlptError, RunStopped, TeacherError
from megatron_rlpt.observe.terminal import one_line, plain, say
from megatron_rlpt.trainer.stop import STOP_FILE

TRAINER = "trainer"
RLPT = (sys.executable, "-m", "megatron_rlpt")
BUFFER = "buffer.json"
"""File in ``Spec.shared`` with the address of the buffer."""
PASSWORD = "password"
"""File in ``Spec.shared`` with the password of Redis."""
_POLL = 0.5
_BEAT = 5.0
"""Seconds between two words of a component about itself."""
_GRACE = 60.0
"""Seconds a command has to end when it is told to."""
_SIGNALLED = 128
"""Added to the number of a signal that ended a process, as shells do."""
_LAST_WORDS = 40
"""Lines of a log that are repeated where a component fails."""


@dataclass(frozen=True)
class Task:
    """Which of the processes of a role this is."""

    role: str
    number: int
    """Among all of the role."""
    local: int
    """Among those of the role on this node."""
    start: str
    """The start of the job that it belongs to: differs when a job is queued again."""

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.role}-{self.number:05d}"

    @staticmethod
    def here(role: str) -> Task:
        """From the variables of Slurm, or of ``launch.local``."""
        get = os.environ.get
        number = get("RLPT_TASK") or get("SLURM_PROCID") or "0"
        local = get("RLPT_TASK") or get("SLURM_LOCALID") or "0"
        start = get("RLPT_START") or f"{get('SLURM_JOB_ID', '')}.{get('SLURM_RESTART_COUNT', '0')}"
        return Task(role, int(number), int(local), start)


class RunningComponent:
    """A command that is started, watched, told to end and, but for the trainer, started again."""

    def __init__(self, spec: Spec, task: Task) -> None:
        """
        Args:
            spec: of the launch.
            task: which of its processes this is.

        Raises:
            ConfigError: the file of secrets cannot be used.
        """
        self.spec, self.task = spec, task
        self.stopped = threading.Event()
        """Set when it is to end."""
        self.left_by: int | None = None
        """Exit code of the run's other job, once that has ended for good; this one ends as well then."""
        self.environment = {**os.environ, **spec.environment, **spec.own_secrets(), **read_secrets(spec.secrets_file)}
        """Variables of its command."""
        self._told, self._over = EndRequest(), threading.Event()
        self._log = spec.logs / f"{task.name}.log"
        self._state, self._pid, self._since, self._starts = "starting", 0, time.time(), 0
        self._saying = threading.Lock()

    def __enter__(self) -> RunningComponent:
        """Take signals, and keep ``rlpt status`` told, from a thread of its own; main thread only."""
        # Schedulers send SIGUSR1 where the time is nearly up, and both to every process of a job when asked to.
        self._told.listen(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self.say("starting")
        threading.Thread(target=self._keep, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    @property
    def part(self) -> Part:
        """The job of the run that it belongs to."""
        if not self.spec.separate:
            return Part.run
        return Part.training if self.task.role == TRAINER else Part.judging

    def say(self, state: str, pid: int = 0) -> None:
        """Tell ``rlpt status`` what this component does."""
        self._state, self._pid = state, pid
        self._say_again()

    def is_to_end(self) -> bool:
        """Whether it is; a trainer also where the run was asked to stop."""
        asked = self.task.role == TRAINER and (Path(self.spec.run_dir) / STOP_FILE).exists()
        return asked or self.stopped.is_set()

    def sleep(self, seconds: float) -> None:
        """Wait so long, or until it is to end."""
        self.stopped.wait(seconds)

    def run(self, command: Sequence[str], *, again: bool) -> int:
        """Run ``command`` until it ends for good, or this component is to end.

        Args:
            command: program and arguments.
            again: whether it is started again when it ends.

        Returns:
            Its exit code, 128 + number for a signal; 0 where it is one to be started again and was told to end.

        Raises:
            ConfigError: the program is not there.
        """
        restarts = Restarts()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with self._log.open("ab") as log:
                try:
                    process = start_child(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment)
                except OSError as error:
                    raise ConfigError(f"{command[0]} cannot be started on this node: {error.strerror}") from None
            self._starts, self._since = self._starts + 1, time.time()
            code = self._watch(process, None if self.task.role == TRAINER else _GRACE)
            if self.stopped.is_set():
                return 0 if again else code
            if again and (delay := restarts.ended()) is not None:
                print(f"{self.task.name} ended with exit code {code} and is started again", flush=True)
                self.say(f"ended with exit code {code}; starts again")
                self.stopped.wait(delay)
                continue
            return code if code or not again else 1

    def failed(self, code: int, why: str = "") -> None:
        """Leave last words where whoever looks at the job finds them."""
        self.say(f"failed with exit code {code}")
        said = why or _tail(self._log)
        words = plain(
            f"{self.task.name} on {socket.gethostname()} failed with exit code {code}; {self._log} ends with\n{said}",
            keep="\n\t",
        )
        print(words, flush=True)
        failed, jobs = self.spec.shared / "failed", self.spec.shared / JOBS
        for folder in (failed, jobs):
            folder.mkdir(parents=True, exist_ok=True)
        (failed / self.task.name).write_text(words + "\n", encoding="utf-8")
        # Where the first rank that fails ends the others, srun may well return what those ended with.
        with contextlib.suppress(FileExistsError), (jobs / exit_code_of(self.part)).open("x") as file:
            file.write(str(code))

    def _watch(self, process: subprocess.Popen[bytes], grace: float | None) -> int:
        """Until the process has ended, or is ended because this component is to; its exit code."""
        self.say("running", process.pid)
        try:
            while process.poll() is None and not self.stopped.wait(_POLL):
                pass
            if grace is None and process.poll() is None:
                # Not a signal: who sent one to all sent it to the trainer, and a second one would end it at once.
                (Path(self.spec.run_dir) / STOP_FILE).touch()
                # As long as it takes: what is in the middle of a step has a checkpoint to write.
                process.wait()
        finally:
            end_all([process], grace or 0.0)
        code = process.returncode
        self.say(f"ended with exit code {code}", process.pid)
        return code if code >= 0 else _SIGNALLED - code

    def _keep(self) -> None:
        """What goes on beside the command: signs of life, and looking for reasons to end."""
        due = time.monotonic() + _BEAT
        # Also while it ends: a trainer that is in its last step is not one that is gone.
        while not self._over.wait(_POLL):
            if self._told.is_set() and (self.task.role == TRAINER or self.spec.separate or self._trainer_is_over()):
                self.stopped.set()
            if time.monotonic() < due:
                continue
            due = time.monotonic() + _BEAT
            self._say_again()
            if self.spec.separate and not self.stopped.is_set():
                self.left_by = exit_code_of_other(self.spec.shared, self.part)
                if self.left_by is not None:
                    self.stopped.set()

    def _trainer_is_over(self) -> bool:
        """Whether nothing of this start trains any more: a trainer that is told to stop needs the others till then."""
        return all(
            said["start"] != self.task.start or said["state"].startswith(OVER) or time.time() - said["time"] > SILENT
            for said in said_by_components(self.spec.shared, TRAINER, start=str, state=str, time=float | int)
        )

    def _say_again(self) -> None:
        said = {
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
        with self._saying:
            try:
                publish(self.spec.shared / STATUS / f"{self.task.name}.json", said)
            except OSError as error:
                # A file system that has the hiccups must not end a run of hours.
                print(f"{self.task.name} cannot say how it is: {error}", file=sys.stderr, flush=True)


def run_component(role: str, spec: Spec) -> int:
    """Run one component to its end; its exit code.

    A trainer that stopped as asked, and one that is done, end with 0 and leave a file that says which. An exit code
    other than 0 would make srun end the other ranks, which may still be writing.
    """
    task = Task.here(role)
    try:
        this = RunningComponent(spec, task)
    except RlptError as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return error.exit_code
    with this:
        return _run(this)


def _run(this: RunningComponent) -> int:
    role, shared, why = this.task.role, this.spec.shared, ""
    try:
        code = ROLES[role](this)
    except RlptError as error:
        code, why = error.exit_code, f"error: {error}"
    if role == TRAINER and this.left_by is not None and code:
        why = f"error: the judging job has ended with exit code {this.left_by}; its output says why"
        code = this.left_by or TeacherError.exit_code
    elif code == RunStopped.exit_code or (this.stopped.is_set() and (role != TRAINER or code > _SIGNALLED)):
        this.say("ended as asked")
        if role == TRAINER and code == RunStopped.exit_code:
            (shared / STOPPED).write_text(this.task.start, encoding="utf-8")
        return 0
    if code:
        this.failed(code, why)
    elif role == TRAINER:
        (shared / DONE).write_text(this.task.start, encoding="utf-8")
    return code


def _buffer(this: RunningComponent) -> int:
    folder = this.spec.shared / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    port = this.spec.redis_port or free_port("0.0.0.0")
    password = made_up(this.spec.shared / PASSWORD)
    bind, host = ("127.0.0.1 -::1", LOOPBACK) if this.spec.one_machine else ("* -::*", socket.gethostname())
    # Not on the command line, where every user of the node could read it.
    write_private(
        folder / "redis.conf",
        f'port {port}\nbind {bind}\nrequirepass {password}\ndir "{folder}"\n'
        'appendonly yes\nappendfsync everysec\nsave ""\n',
    )
    publish(this.spec.shared / BUFFER, {"url": f"redis://{host}:{port}/0"})
    return this.run(["redis-server", str(folder / "redis.conf")], again=True)


def _teacher(this: RunningComponent) -> int:
    overrides = await_buffer(this)
    if gpus := this.spec.server_gpus:
        first = this.task.local * gpus
        # Some of those that were allocated; they need not be the node's first, nor have numbers for names.
        visible = this.environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(first + gpus)))
        this.environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + gpus])
    command = [*RLPT, "teacher", "serve", "-c", this.spec.config, "--concurrency", str(this.spec.concurrency)]
    command += ["--host", LOOPBACK if this.spec.one_machine else "0.0.0.0"]
    return this.run([*command, *overrides, *this.spec.server_arguments], again=True)


def _judges(this: RunningComponent) -> int:
    command = [*RLPT, "judge", "serve", "-c", this.spec.config, "--workers", str(this.spec.judge_workers)]
    return this.run([*command, *await_buffer(this)], again=True)


def _trainer(this: RunningComponent) -> int:
    overrides = await_buffer(this)
    if "judges" in this.spec.components:
        this.say("waiting for a first judgment")
        await_judgment(this, overrides, this.task.number == 0, this.task.start)
    return this.run([*RLPT, "train", "-c", this.spec.config, *overrides], again=False)


ROLES: dict[str, Callable[[RunningComponent], int]] = {
    "buffer": _buffer,
    "teacher": _teacher,
    "judges": _judges,
    TRAINER: _trainer,
}


def _tail(log: Path) -> str:
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return "".join(deque(lines, _LAST_WORDS)).rstrip()
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
