"""Resources that this machine offers a process: cores, memory, shared memory, disk, with container limits applied."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")
"""CPU flags for bf16 arithmetic: three of x86, one of Arm."""
_BF16_KERNELS = {*_BF16_FLAGS, "avx512f", "avx_ne_convert"}
"""CPU flags for which oneDNN, used by PyTorch and vLLM, has bf16 kernels."""
_GPUS = ("dev/nvidiactl", "dev/kfd")


@dataclass(frozen=True)
class Machine:
    """Resources; sizes in bytes, None for no limit or an unknown value."""

    cpu: str
    """Model name of the CPU."""
    bf16_flags: tuple[str, ...]
    """The CPU's flags among avx512_bf16, amx_bf16, amx_tile (x86) and bf16 (Arm)."""
    avx512: bool
    cores: int
    """Cores this process may run on (affinity)."""
    core_limit: float | None
    """CPU time limit of the control group, in cores."""
    memory_total: int
    memory_available: int
    memory_limit: int | None
    """Memory limit of the control group."""
    shm_total: int | None
    """Size of /dev/shm."""
    disk_free: int
    """Free space in the working directory."""

    @property
    def usable_cores(self) -> float:
        """Cores that the process can use: the smaller of affinity and control group limit."""
        return min(self.cores, self.core_limit or self.cores)


def inspect_machine(root: Path = Path("/")) -> Machine:
    """Inspect this machine; tests pass another ``root`` of the file system."""
    name, flags = _cpu(root / "proc/cpuinfo")
    memory = _meminfo(root / "proc/meminfo")
    shm = root / "dev/shm"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = memory.get("MemTotal", 0)
    limit = memory_limit(root)
    return Machine(
        cpu=name,
        bf16_flags=tuple(flag for flag in _BF16_FLAGS if flag in flags),
        avx512="avx512f" in flags,
        cores=cores,
        core_limit=core_limit(root),
        memory_total=total,
        memory_available=memory.get("MemAvailable", 0),
        # Without a limit, control groups version 1 report a number close to 2^63.
        memory_limit=limit if limit is not None and limit < total else None,
        shm_total=shutil.disk_usage(shm).total if shm.is_dir() else None,
        disk_free=shutil.disk_usage(".").free,
    )


@functools.cache
def bf16_is_slow(root: Path = Path("/")) -> bool:
    """Return whether models run on a CPU whose bf16 is several times slower than fp32: AVX2 only, as in most laptops.

    False if unknown.
    """
    _, flags = _cpu(root / "proc/cpuinfo")
    return bool(flags) and not _BF16_KERNELS & flags and not has_gpu(root)


def has_gpu(root: Path = Path("/")) -> bool:
    """Return whether an NVIDIA or AMD GPU driver is loaded; works without torch."""
    return any((root / device).exists() for device in _GPUS)


def core_limit(root: Path = Path("/")) -> float | None:
    """Return the CPU limit in cores of the control group and its ancestors; None without a limit."""
    limits: list[float] = []
    for folder in _cgroup_folders(root, ""):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    for folder in _cgroup_folders(root, "cpu"):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the memory limit in bytes of the control group and its ancestors; None without a limit."""
    texts = [_read(folder / "memory.max") for folder in _cgroup_folders(root, "")]
    texts += [_read(folder / "memory.limit_in_bytes") for folder in _cgroup_folders(root, "memory")]
    return min((int(text) for text in texts if text.isdigit()), default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's control group and its ancestors: version 2 for ``""``, else v1."""
    base = root / "sys/fs/cgroup" / controller
    folders = [base]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            for part in Path(path.lstrip("/")).parts:
                folders.append(folders[-1] / part)
    return folders


def _cpu(path: Path) -> tuple[str, set[str]]:
    name, flags = "unknown", set[str]()
    for line in _read(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            return name, set(value.split())
    return name, flags


def _meminfo(path: Path) -> dict[str, int]:
    """Return bytes by name; the file has kB."""
    sizes: dict[str, int] = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        number = value.split()[0] if value.split() else ""
        if number.isdigit():
            sizes[name] = int(number) * 1024
    return sizes


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # the file does not exist on this system, or with this version of control groups
        return ""
