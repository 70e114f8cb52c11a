"""Turns between processes that are measured against each other: one works while the other waits."""

from __future__ import annotations

import os
import time
from pathlib import Path

FOLDER, NAME = "RLPT_TURNS", "RLPT_TURN"
_POLL = 0.002


class Turns:
    """The turns of this process, in files of a folder that the environment names."""

    def __init__(self) -> None:
        self._folder, self._name = Path(os.environ[FOLDER]), os.environ[NAME]
        self._count = 0

    def wait(self) -> None:
        """Say that this process has done its step, and wait for its next turn."""
        (self._folder / f"{self._name}.ready.{self._count}").touch()
        while not (self._folder / f"{self._name}.go.{self._count}").exists():
            time.sleep(_POLL)
        self._count += 1
