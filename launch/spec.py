"""What components share: the spec of the launch, and a folder in which they find each other.

<run.dir>/cluster/   buffer.json      address of the rollout buffer
                     password         of Redis, mode 0600
                     server-key       of the teacher's servers, mode 0600
                     status/*.json    state of every component
                     failed/*         errors of components that failed
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
"""Folder in ``SHARED`` with the state of every component."""
DONE, STOPPED = "done", "stopped"
"""Files in ``SHARED``: the start of the job whose trainer is done, or stopped as requested."""
UNFINISHED = 143
"""Exit code for a trainer that was terminated before it was done: 128 + SIGTERM."""
KEY_VARIABLE = "RLPT_TEACHER_KEY"
"""Variable with the key that the teacher's servers require, unless the configuration names another."""
SILENT = 30.0
"""Seconds without a status report after which a component counts as dead."""
OVER = ("ended", "failed")
"""First words of the states of components that have ended."""


@dataclass(frozen=True)
class ServerSpec:
    """Settings of the servers of one model."""

    per_node: int = 1
    gpus: int = 0
    """GPUs of one server."""
    concurrency: int = 32
    arguments: tuple[str, ...] = ()
    model_role: str = ""
    """Role of the teacher that they serve, where judge and rewriter are two models."""


@dataclass(frozen=True)
class Spec:
    """Settings of a launch, written next to the code and read by every component."""

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
    servers: Mapping[str, ServerSpec] = field(default_factory=dict)
    """Component -> its servers."""
    judge_workers: int = 0
    ranks_per_node: int = 1
    restart_trainer: bool = False
    """Whether to restart a trainer that crashed."""
    gate: float = 1800.0
    one_machine: bool = False
    """Whether all components are on one machine, so that servers listen on it alone."""
    generates_key: bool = False
    """Whether the teacher's servers require a key that is generated for the run (``KEY_VARIABLE``)."""
    separate: bool = False
    """Whether judging and training are separate jobs (``slurm_jobs.py``)."""

    @property
    def shared(self) -> Path:
        """Return the folder in which components find each other."""
        return Path(self.run_dir) / SHARED

    @property
    def logs(self) -> Path:
        """Return the folder of all logs."""
        return Path(self.run_dir) / "logs"

    def generated_secrets(self) -> dict[str, str]:
        """Return the variables with secrets that are generated for the run."""
        return {KEY_VARIABLE: generated_secret(self.shared / "server-key")} if self.generates_key else {}

    def write(self, path: Path) -> None:
        """Write the spec for ``read``."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Spec:
        """Read a spec that ``write`` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["components"] = tuple(raw["components"])
        raw["servers"] = {
            name: ServerSpec(**server | {"arguments": tuple(server["arguments"])})
            for name, server in raw["servers"].items()
        }
        return Spec(**raw)


def generated_secret(file: Path) -> str:
    """Return the secret in ``file``, which is generated on first use."""
    with contextlib.suppress(FileExistsError):
        write_private(file, secrets.token_hex(32), replace=False)
    return file.read_text(encoding="utf-8").strip()


def write_private(file: Path, text: str, *, replace: bool = True) -> None:
    """Write ``file`` atomically, readable by its owner alone from the first moment.

    Raises:
        FileExistsError: it exists and ``replace`` is false.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text, mode=0o600, replace=replace)


def publish(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file for other processes atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value), durable=False)


def read_published(path: Path, **kinds: type | UnionType) -> dict[str, Any]:
    """Read what ``publish`` wrote; return an empty dict if the file is missing or damaged.

    Args:
        path: the file.
        kinds: required fields and their types. Numbers must be finite and not negative: some are process IDs to signal.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(content, dict) and all(_is_a(kind, content.get(name)) for name, kind in kinds.items())
    return content if whole else {}


def read_reports(shared: Path, role: str = "*", /, **kinds: type | UnionType) -> list[dict[str, Any]]:
    """Return the last status reports of components, by name, without damaged ones (see ``read_published``)."""
    reports = (read_published(path, **kinds) for path in sorted((shared / STATUS).glob(f"{role}-*.json")))
    return [report for report in reports if report]


def _is_a(kind: type | UnionType, value: object) -> bool:
    if isinstance(value, int | float) and (isinstance(value, bool) or not 0 <= value < math.inf):
        return False
    return isinstance(value, kind)


def read_secrets(file: str) -> dict[str, str]:
    """Read variables from a file of lines ``NAME=value``, skipping empty lines and comments (``#``).

    Raises:
        ConfigError: it cannot be read, others can read it, or a line has another form; the line itself is not shown.
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
