"""Python without torch and what needs it, as on a login node."""

from __future__ import annotations

import subprocess
import sys

_BLOCKER = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "vllm", "transformers", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
"""


def run_without_torch(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``arguments`` in a new process that cannot import torch."""
    command = [sys.executable, "-c", _BLOCKER + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
