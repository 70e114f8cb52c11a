"""What a component finds on its node: one file that says what the launch was asked for, and a folder that they share.

<run.dir>/cluster/   buffer.json      where the rollout buffer answers
                     password         of Redis, mode 0600
                     server-key       of the teacher's servers, mode 0600
                     status/*.json    what every component does
                     failed/*         last words of components that failed
<run.dir>/logs/      one log per component
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.files import read_private, write_atomically

SHARED = "cluster"
"""Folder in ``run.dir``."""
STATUS = "status"
"""Folder in that one with what every component says of itself."""
DONE, STOPPED = "done", "stopped"
"""Files in ``SHARED``: the start of the job whose trainer is done, or has stopped as asked."""
UNFINISHED = 143
"""Exit code where the trainer was ended before it was done: that of what SIGTERM ends."""
KEY_VARIABLE = "RLPT_TEACHER_KEY"
"""Of the key that servers of the teacher ask for and workers send, where the user names no other."""
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
    restart_trainer: bool = False
    """Whether to restart a trainer that crashed."""
    gate: float = 1800.0
    one_machine: bool = False
    """Whether all components are on one machine, so that nothing needs to be reached from another."""
    generates_key: bool = False
    """Whether servers of the teacher ask for a key that is made up for the run (``KEY_VARIABLE``)."""
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

    def generated_secrets(self) -> dict[str, str]:
        """Variables with what is made up for the run."""
        return {KEY_VARIABLE: generated_secret(self.shared / "server-key")} if self.generates_key else {}

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


def generated_secret(file: Path) -> str:
    """The secret in ``file``, which the first of the run's components that asks for it makes up."""
    with contextlib.suppress(FileExistsError):
        write_private(file, secrets.token_hex(32), replace=False)
    return file.read_text(encoding="utf-8").strip()


def write_private(file: Path, text: str, *, replace: bool = True) -> None:
    """Write ``file``, whole, so that it was never readable by others.

    Raises:
        FileExistsError: it is there, and not to be replaced.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text, mode=0o600, replace=replace)


def publish(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file that others read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value), durable=False)


def read_published(path: Path, **kinds: type | UnionType) -> dict[str, Any]:
    """What ``publish`` wrote; nothing where there is no such file, or a damaged one.

    Args:
        path: the file.
        kinds: fields it must have, with their types. Numbers are finite and not negative: some are processes to end.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(content, dict) and all(_is_a(kind, content.get(name)) for name, kind in kinds.items())
    return content if whole else {}


def read_reports(shared: Path, role: str = "*", /, **kinds: type | UnionType) -> list[dict[str, Any]]:
    """What components last said of themselves, by name; damaged words are left out, see ``read_published``."""
    said = (read_published(path, **kinds) for path in sorted((shared / STATUS).glob(f"{role}-*.json")))
    return [component for component in said if component]


def _is_a(kind: type | UnionType, value: object) -> bool:
    if isinstance(value, int | float) and (isinstance(value, bool) or not 0 <= value < math.inf):
        return False
    return isinstance(value, kind)


def read_secrets(file: str) -> dict[str, str]:
    """Variables out of a file of lines ``NAME=value``; empty lines and lines after ``#`` are left out.

    Raises:
        ConfigError: it cannot be read, is readable by others, or has another line; the line itself is not shown.
    """
    if not file:
        return {}
    lines = read_private(file, "secrets_file").splitlines()
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"{file}, line {number}, is not of the form NAME=value")
        found[name.strip()] = value.strip()
    return found
