"""What a component finds on its node: one file that says what the launch was asked for, and a folder that they share.

<run.dir>/cluster/   buffer.json      where the rollout buffer answers
                     password         of Redis, mode 0600
                     status/*.json    what every component does
                     failed/*         last words of components that failed
<run.dir>/logs/      one log per component
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ConfigError

SHARED = "cluster"
"""Folder in ``run.dir``."""
DONE, STOPPED = "done", "stopped"
"""Files in that folder: the start of the job whose trainer is done, or has stopped as asked."""
UNFINISHED = 143
"""Exit code where the trainer was ended before it was done: that of what SIGTERM ends."""
SILENT = 30.0
"""Seconds without a word after which a component counts as gone."""
OVER = ("ended", "failed")
"""First words of what components say that have ended."""


@dataclass(frozen=True)
class Spec:
    """Written by the launcher beside the code, read by every component."""

    run_dir: str
    config: str
    """File of the resolved configuration, relative to the code."""
    components: tuple[str, ...]
    """Roles that the launch consists of."""
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets_file: str = ""
    redis_port: int = 0
    trainer_gpus: int = 0
    """GPUs of the trainer on a node."""
    servers_per_node: int = 1
    server_gpus: int = 0
    """GPUs of one server of the teacher."""
    concurrency: int = 32
    server_arguments: tuple[str, ...] = ()
    judge_workers: int = 0
    ranks_per_node: int = 1
    gate: float = 1800.0
    separate: bool = False
    """Whether judging and training are jobs of their own (``pair.py``)."""

    @property
    def shared(self) -> Path:
        """The folder that components find each other in."""
        return Path(self.run_dir) / SHARED

    @property
    def logs(self) -> Path:
        """The folder of everybody's logs."""
        return Path(self.run_dir) / "logs"

    def write(self, path: Path) -> None:
        """Write it for ``read``."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Spec:
        """What ``write`` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        for name in ("components", "server_arguments"):
            raw[name] = tuple(raw[name])
        return Spec(**raw)


def publish(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file that others read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial, path)


def read_published(path: Path) -> dict[str, Any]:
    """What ``publish`` wrote; nothing where there is no such file, or not a whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_secrets(file: str) -> dict[str, str]:
    """Variables out of a file of lines ``NAME=value``; empty lines and lines after ``#`` are left out.

    Raises:
        ConfigError: it cannot be read, is readable by others, or has another line; the line itself is not shown.
    """
    if not file:
        return {}
    try:
        with Path(file).open(encoding="utf-8") as handle:
            mode = os.fstat(handle.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise ConfigError(f"{file} has mode {mode:04o}, so others can read the secrets; run: chmod 600 {file}")
            lines = handle.read().splitlines()
    except OSError as error:
        raise ConfigError(f"secrets_file {file} cannot be read: {error.strerror}") from None
    secrets = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"{file}, line {number}, is not of the form NAME=value")
        secrets[name.strip()] = value.strip()
    return secrets
