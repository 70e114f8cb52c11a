"""What the processor is good at, where models run on one."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_MULTIPLY_BF16 = {"avx512f", "avx_ne_convert", "amx_bf16"}
"""Flags of x86 processors on which oneDNN, which multiplies for PyTorch and vLLM, has kernels for bf16."""
_GPUS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


@functools.cache
def bf16_is_slow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bf16 is several times slower here than fp32: on an x86 processor with AVX2 alone, and no GPU.

    Most laptops have one of these. Needs no PyTorch.
    """
    if platform.machine() != "x86_64" or not cpuinfo.exists() or any(device.exists() for device in _GPUS):
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return not _MULTIPLY_BF16 & set(flags.split())
