"""Policies of one file, for tests of the checkpoint store."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OneFile:
    """A policy whose state is ``content``; ``before`` runs in ``write`` and may fail or wait."""

    content: str = "weights"
    before: Callable[[Path], None] = field(default=lambda _: None)

    def layout_text(self) -> str:
        return "1 rank: TP1"

    def begin_save(self, folder: Path, snapshot: bool) -> OneFileWriting:
        return OneFileWriting(folder, self.content, self.before)


@dataclass
class OneFileWriting:
    folder: Path
    content: str
    before: Callable[[Path], None]

    def write(self) -> tuple[list[Path], Any]:
        path = self.folder / "weights"
        path.write_text(self.content)
        self.before(self.folder)
        return [path], len(self.content)

    def conclude(self, results: list[Any]) -> list[Path]:
        path = self.folder / "whole"
        path.write_text(str(results))
        return [path]


def make_model(folder: Path) -> Path:
    """Create a model folder with files that a checkpoint copies and files that it does not."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond 64 KiB: the kernel refuses the write, as on a full disk.

    Use it around as little code as possible: the output of the tests may be a longer file.
    """
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
