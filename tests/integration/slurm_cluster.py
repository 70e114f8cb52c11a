"""A Slurm sandbox and its jobs, for tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools/slurm_sandbox.sh"


def sandbox(command: str, folder: Path) -> str:
    done = subprocess.run(["bash", str(SCRIPT), command, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Cluster:
    """A sandbox in ``folder``; jobs write ``<number>.out`` there."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | variables

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, script: str, *options: str) -> int:
        path = self.folder / "job.sh"
        path.write_text("#!/bin/bash\n" + script)
        output = f"--output={self.folder}/%j.out"
        return int(self.run("sbatch", "--parsable", "--open-mode=append", output, *options, str(path)))

    def wait_for_line(self, job: int, pattern: str) -> re.Match[str]:
        """Wait until the output of ``job`` has ``pattern``."""
        path = self.folder / f"{job}.out"
        text = self.wait(lambda: path.is_file() and re.search(pattern, path.read_text()))
        assert text
        return text

    def wait_for_record(self, job: int, state: str, *options: str) -> dict[str, str]:
        """Wait until accounting has ``job`` in ``state`` and return its record; accounting lags by some seconds."""

        def find() -> dict[str, str] | None:
            rows = self.run("sacct", "-n", "-P", "-X", "-o", "State,ExitCode", "-j", str(job), *options)
            values = (row.split("|") for row in rows.splitlines())
            return next((dict(zip(("state", "code"), row, strict=True)) for row in values if row[0] == state), None)

        return self.wait(find)

    @staticmethod
    def wait(find):
        deadline = time.monotonic() + 180
        while not (found := find()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return found


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Yield a sandbox that is always stopped."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the folders of pytest are too deep for a Unix socket
    name, _, value = sandbox("start", folder).strip().removeprefix("export ").partition("=")
    try:
        yield Cluster(folder, {name: value})
    finally:
        sandbox("stop", folder)
    shutil.rmtree(folder)
