"""One component of a run on its node: waits for what it needs, starts its command, and watches it.

    python -m launch.component ROLE SPEC

    buffer    Redis; says where it answers                          is started again
    teacher   waits for the buffer, then ``rlpt teacher serve``     is started again
    judges    waits for the buffer, then ``rlpt judge serve``       is started again
    trainer   waits for a first judgment, then ``rlpt train``       its exit code is that of the component

A component that cannot be kept going ends with the exit code of its command, its last words in its log and in
``cluster/failed``; whoever started all of them ends the others then.
"""

from __future__ import annotations

import argparse
import os
import secrets
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

from launch.gate import await_buffer, await_judgment
from launch.pair import Part, exit_code_of_other
from launch.spec import Spec, publish, read_secrets
from megatron_rlpt.errors import RlptError, RunStopped, TeacherError
from megatron_rlpt.processes import Restarts, end_all, start_child
from megatron_rlpt.stopping import STOP_FILE

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


class Component:
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
        """Set when it is told to end."""
        self.left_by: int | None = None
        """Exit code of the run's other job, once that has ended for good; this one ends as well then."""
        self.environment = {**os.environ, **spec.environment, **read_secrets(spec.secrets_file)}
        """Variables of its command."""
        self._log = spec.logs / f"{task.name}.log"
        self._status = spec.shared / "status" / f"{task.name}.json"
        self._since = time.time()
        self._starts = 0

    def say(self, state: str, pid: int = 0) -> None:
        """Tell ``rlpt status`` what this component does."""
        publish(
            self._status,
            {
                "component": self.task.name,
                "role": self.task.role,
                "state": state,
                "host": socket.gethostname(),
                "pid": pid,
                "since": self._since,
                "time": time.time(),
                "starts": self._starts,
                "log": str(self._log),
                "start": self.task.start,
            },
        )

    def look_after_other_job(self) -> None:
        """End when the run's other job has ended for good, which a thread of its own looks for."""
        trains = self.task.role == TRAINER
        part = Part.training if trains else Part.judging

        def look() -> None:
            while self.left_by is None and not self.stopped.wait(_BEAT):
                self.left_by = exit_code_of_other(self.spec.shared, part)
            if self.left_by is None:
                return
            if trains and self._starts:
                # As long as it takes: what is in the middle of a step has a checkpoint to write.
                (Path(self.spec.run_dir) / STOP_FILE).touch()
            else:
                self.stopped.set()

        threading.Thread(target=look, daemon=True).start()

    def run(self, command: Sequence[str], *, again: bool) -> int:
        """Run ``command`` until it ends for good, or this component is told to stop.

        Args:
            command: program and arguments.
            again: whether it is started again when it ends.

        Returns:
            Its exit code, 128 + number for a signal; 0 where it ended because it was told to.
        """
        restarts = Restarts()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with self._log.open("ab") as log:
                process = start_child(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment)
            self._starts, self._since = self._starts + 1, time.time()
            code = self._watch(process)
            if self.stopped.is_set():
                return code if not again and code > 0 else 0
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
        words = (
            f"{self.task.name} on {socket.gethostname()} failed with exit code {code}; {self._log} ends with\n{said}"
        )
        print(words, flush=True)
        folder = self.spec.shared / "failed"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.task.name).write_text(words + "\n", encoding="utf-8")

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        due = 0.0
        while process.poll() is None and not self.stopped.wait(_POLL):
            if time.monotonic() >= due:
                self.say("running", process.pid)
                due = time.monotonic() + _BEAT
        end_all([process], _GRACE)
        code = process.returncode
        self.say(f"ended with exit code {code}", process.pid)
        return code if code >= 0 else 128 - code


def run_component(role: str, spec: Spec) -> int:
    """Run one component to its end; its exit code."""
    task = Task.here(role)
    try:
        this = Component(spec, task)
    except RlptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: this.stopped.set())
    this.say("starting")
    if spec.separate:
        this.look_after_other_job()
    why = ""
    try:
        code = ROLES[role](this)
    except RlptError as error:
        code, why = error.exit_code, f"error: {error}"
    if this.left_by is not None:
        if role != TRAINER or not code:
            return 0
        why = f"error: the judging job has ended with exit code {this.left_by}; its output says why"
        code = this.left_by or TeacherError.exit_code
    if code not in (0, RunStopped.exit_code):
        this.failed(code, why)
    return code


def _buffer(this: Component) -> int:
    folder = this.spec.shared / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    port = this.spec.redis_port or _free_port()
    password = _password(this.spec.shared / PASSWORD)
    # Not on the command line, where every user of the node could read it.
    _write_private(
        folder / "redis.conf",
        f"port {port}\nbind * -::*\nrequirepass {password}\ndir {folder}\n"
        'appendonly yes\nappendfsync everysec\nsave ""\n',
    )
    publish(this.spec.shared / BUFFER, {"url": f"redis://{socket.gethostname()}:{port}/0", "start": this.task.start})
    return this.run(["redis-server", str(folder / "redis.conf")], again=True)


def _teacher(this: Component) -> int:
    overrides = await_buffer(this.spec, this.stopped)
    if gpus := this.spec.server_gpus:
        first = this.task.local * gpus
        this.environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + number) for number in range(gpus))
    command = [*RLPT, "teacher", "serve", "-c", this.spec.config, "--concurrency", str(this.spec.concurrency)]
    return this.run([*command, *overrides, *this.spec.server_arguments], again=True)


def _judges(this: Component) -> int:
    command = [*RLPT, "judge", "serve", "-c", this.spec.config, "--workers", str(this.spec.judge_workers)]
    return this.run([*command, *await_buffer(this.spec, this.stopped)], again=True)


def _trainer(this: Component) -> int:
    overrides = await_buffer(this.spec, this.stopped)
    if "judges" in this.spec.components:
        this.say("waiting for a first judgment")
        asks = this.task.number == 0
        await_judgment(this.spec, overrides, this.environment, asks, this.task.start, this.stopped)
    return this.run([*RLPT, "train", "-c", this.spec.config, *overrides], again=False)


ROLES: dict[str, Callable[[Component], int]] = {
    "buffer": _buffer,
    "teacher": _teacher,
    "judges": _judges,
    TRAINER: _trainer,
}


def _password(file: Path) -> str:
    """The run's password, made up at its first start."""
    if not file.exists():
        _write_private(file, secrets.token_hex(32))
    return file.read_text(encoding="utf-8").strip()


def _write_private(file: Path, text: str) -> None:
    """Write ``file`` so that it was never readable by others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as handle:
        handle.write(text)
    os.replace(partial, file)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


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
