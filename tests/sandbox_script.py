"""Runs the scripts of tools/sandbox as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def call(script: Path, *arguments: object, path: str = os.environ["PATH"]) -> tuple[int, str, str]:
    """Run ``script`` with PATH ``path``; return exit code, standard output and stripped standard error."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr.strip()
