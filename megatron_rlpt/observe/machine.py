"""What this machine offers a process: cores, memory, shared memory, disk, with container limits taken into account."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")
"""CPU flags that speak of bf16 arithmetic: x86's three, and Arm's."""
_BF16_KERNELS = {*_BF16_FLAGS, "avx512f", "avx_ne_convert"}
"""CPU flags with which oneDNN, which multiplies for PyTorch and vLLM, has kernels for bf16 at all."""
_GPUS = ("dev/nvidiactl", "dev/kfd")


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes; None means there is no limit, or the system does not say."""

    cpu: str
    """Model name of the CPU."""
    bf16_flags: tuple[str, ...]
    """Which of avx512_bf16, amx_bf16, amx_tile (x86) and bf16 (Arm) the CPU has."""
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
    """Free space where the process was started."""

    @property
    def usable_cores(self) -> float:
        """Cores that can be busy at the same time: the smaller of affinity and control group."""
        return min(self.cores, self.core_limit or self.cores)


def inspect_machine(root: Path = Path("/")) -> Machine:
    """Look at this machine; ``root`` stands for the root of the file system, so that a test can give its own."""
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
        # Without a limit, version 1 of control groups gives a number close to 2^63.
        memory_limit=limit if limit is not None and limit < total else None,
        shm_total=shutil.disk_usage(shm).total if shm.is_dir() else None,
        disk_free=shutil.disk_usage(".").free,
    )


@functools.cache
def bf16_is_slow(root: Path = Path("/")) -> bool:
    """Whether models run on a CPU here on which bf16 is several times slower than fp32: AVX2 alone, as in most laptops.

    False where that cannot be told.
    """
    _, flags = _cpu(root / "proc/cpuinfo")
    return bool(flags) and not _BF16_KERNELS & flags and not has_gpu(root)


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether there is a driver of NVIDIA's or AMD's GPUs; asked without torch."""
    return any((root / device).exists() for device in _GPUS)


def core_limit(root: Path = Path("/")) -> float | None:
    """Cores' worth of CPU time the control group grants, the tightest of its ancestors; None without a limit."""
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
    """Bytes the control group grants, the tightest of its ancestors; None without a limit."""
    texts = [_read(folder / "memory.max") for folder in _cgroup_folders(root, "")]
    texts += [_read(folder / "memory.limit_in_bytes") for folder in _cgroup_folders(root, "memory")]
    return min((int(text) for text in texts if text.isdigit()), default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and its ancestors: version 2 for ``""``, else that v1 controller."""
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
    """Bytes by name; the file counts in kB."""
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
    except OSError:  # the file belongs to the other version of control groups, or to another system
        return ""
