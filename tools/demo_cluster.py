"""Trainer, judge workers, teacher server and Redis on this machine, until the trainer is done.

    python tools/demo_cluster.py [--config configs/demo_cluster.yaml] [--workers 2] [section.key=value ...]

Whatever ends before the trainer is done is started again, and goes on where it was: the trainer from its checkpoint,
workers with the next groups, Redis with its append-only file. Try it: ``kill -9`` any of the process numbers that are
printed. What ends a sixth time within ten minutes ends all of them with its exit code: no start mends that.

Ctrl-C or SIGTERM ends all of them, once; pressed again it changes nothing. Relative paths, also those in the
configuration, are those of the folder that it is called from. Logs are in ``<run.dir>/logs/``, one file a process; the
trainer's lines are printed as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SANDBOX = ROOT / "tools/sandbox/redis.py"
sys.path.insert(0, str(ROOT))
sys.path.append(str(SANDBOX.parent))  # at the end: its redis.py is not the package of this name

from daemons import is_running, read_processes  # noqa: E402

from megatron_rlpt.config import load_config  # noqa: E402
from megatron_rlpt.distributed.processes import EndRequest, Restarts, end_all, start_child  # noqa: E402
from megatron_rlpt.errors import NothingLearntError, RlptError  # noqa: E402
from megatron_rlpt.observe.machine import bf16_is_slow  # noqa: E402

POLL, GRACE = 0.5, 60.0
"""Seconds between two looks; seconds that all processes have to end after SIGTERM."""
RLPT = (sys.executable, "-m", "megatron_rlpt")


class Process:
    """One process, started again when it ends; it ends with this one."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._command = command
        self._log = log
        self._restarts = Restarts()
        self.hopeless = False
        """Whether it has ended too often to be started again."""

    @property
    def pid(self) -> int:
        """Number of the process that runs, or ran last."""
        return self.running.pid

    def start(self) -> None:
        """Start it, once more where it has ended."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self._log.open("ab") as log:
            self.running = start_child(
                self._command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
            )

    def look(self) -> int | None:
        """Exit code if it has ended; to be started again then, unless it is hopeless."""
        code = self.running.poll()
        if code is not None:
            self.hopeless = self._restarts.ended() is None
        return code


class Redis:
    """The sandbox's server, started again on its append-only file when it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._restarts = Restarts()
        self._started = False

    def _run(self, command: str) -> str:
        # A session of its own: Ctrl-C is for this process, which still has to have Redis ended.
        done = subprocess.run(
            [sys.executable, SANDBOX, command, self._folder], capture_output=True, text=True, start_new_session=True
        )
        if done.returncode:
            raise SystemExit(done.stderr.strip() or f"{SANDBOX} {command} failed")
        return done.stdout

    def start(self) -> list[str]:
        """Start it; the overrides that lead to it."""
        overrides = self._run("start").split()
        self._started = True
        return overrides

    def start_again(self) -> None:
        """Start it once more; leaves the program where that was done too often."""
        if self._restarts.ended() is None:
            raise SystemExit(f"redis ended too often; see {self._folder}/log")
        self.start()

    @property
    def pid(self) -> int:
        """Number of its process."""
        ((number, _),) = read_processes(self._folder).values()
        return number

    def alive(self) -> bool:
        """Whether its process is there."""
        return any(is_running(*process) for process in read_processes(self._folder).values())

    def end(self) -> None:
        """End it if it was started here; what it holds stays."""
        if self._started:
            self._run("stop")


def follow(log: Path, stopped: threading.Event) -> None:
    """Print what is appended to ``log``."""
    with log.open("r", encoding="utf-8", errors="replace") as lines:
        lines.seek(0, os.SEEK_END)
        while not stopped.is_set():
            _print_new(lines)
            stopped.wait(POLL)
        _print_new(lines)


def _print_new(lines: IO[str]) -> None:
    for line in iter(lines.readline, ""):
        print(line, end="", flush=True)


@contextlib.contextmanager
def printed(log: Path) -> Iterator[None]:
    """Print what is appended to ``log`` meanwhile."""
    log.touch()
    stopped = threading.Event()
    thread = threading.Thread(target=follow, args=(log, stopped))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def supervise(redis: Redis, trainer: Process, others: Sequence[Process], told: EndRequest) -> int:
    """Keep everything going until the trainer is done; its exit code, that of what cannot be kept going, or 130."""
    while not told.wait(POLL):
        if not redis.alive():
            redis.start_again()
            print(f"redis ended and was started again (pid {redis.pid})", flush=True)
        for process in (trainer, *others):
            code = process.look()
            if code is None:
                continue
            # What left nothing to learn from leaves it once more.
            if process is trainer and code in (0, NothingLearntError.exit_code):
                return code
            if process.hopeless:
                print(f"{process.name} ended too often, now with exit code {code}; see its log", flush=True)
                return code if code > 0 else 1
            process.start()
            print(f"{process.name} ended (exit code {code}) and was started again (pid {process.pid})", flush=True)
    return 130


def run(folder: Path, config: Path, overrides: Sequence[str], judges: int, told: EndRequest) -> int:
    """Start everything, keep it going, and end it in any case; the exit code."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    redis = Redis(folder / "redis")
    running: list[Process] = []
    try:
        configured = ["--config", str(config), *overrides, *redis.start()]
        trainer = Process("trainer", [*RLPT, "train", *configured], logs / "trainer.log")
        server = [*RLPT, "teacher", "serve", "--host", "127.0.0.1", *configured]
        others = [
            Process("teacher server", server, logs / "teacher.log"),
            *(
                Process(f"judge worker {n}", [*RLPT, "judge", "serve", *configured], logs / f"judge-{n}.log")
                for n in range(1, judges + 1)
            ),
        ]
        with printed(logs / "trainer.log"):
            for process in (trainer, *others):
                process.start()
                running.append(process)
            print("  ".join(f"{p.name}: {p.pid}" for p in running) + f"  redis: {redis.pid}", flush=True)
            return supervise(redis, trainer, others, told)
    finally:
        try:
            end_all([process.running for process in running], GRACE)
        finally:
            redis.end()


def main() -> int:
    """Run the cluster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo_cluster.yaml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    # As tools/demo.sh does; what is asked for wins.
    overrides = [*(["model.dtype=fp32"] if bf16_is_slow() else []), *arguments.overrides]
    try:
        folder = Path(load_config(arguments.config, overrides).run.dir).resolve()
    except RlptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    # Handlers that raise would cut the ending short when Ctrl-C is pressed again.
    told = EndRequest()
    told.listen()
    code = run(folder, arguments.config.resolve(), overrides, arguments.workers, told)
    # Python gives handlers up before it is gone, and exchanges them in two steps.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    print(f"done; the policy is in {folder}/export" if code == 0 else f"ended with exit code {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
