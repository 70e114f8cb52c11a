"""The manifest of a checkpoint: what it is, and every file of it with its size and checksum.

Checksums are XXH3 with 128 bits: they find what disks, networks and half-finished copies do to a file, faster than a
disk delivers it. They are no protection against someone who wants to deceive.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

T = TypeVar("T")

FORMAT = 1
"""Format of the checkpoint folder that this version writes and reads."""
_CHECKSUM = "xxh3_128"
_CHUNK = 4 << 20
_READERS = 4
"""Files read at the same time: one stream does not fill a network file system or a fast disk."""
_NAMED = 3
"""Damaged files that a message names before it only counts."""


@dataclass(frozen=True)
class FileSum:
    """Size and checksum of one file."""

    bytes: int
    checksum: str

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Those of the file as it is now.

        Raises:
            OSError: it cannot be read.
        """
        digest, size, buffer = xxhash.xxh3_128(), 0, bytearray(_CHUNK)
        view = memoryview(buffer)
        with path.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                digest.update(view[:count])
                size += count
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint is and what it consists of."""

    step: int
    layout: str
    """Layout that it was saved under; it can be loaded under any other."""
    files: Mapping[str, FileSum]
    """By path relative to the checkpoint's folder; all but the manifest itself and the marker."""
    versions: Mapping[str, str]
    """Of the packages that wrote it."""

    def write(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            OSError: it cannot be written.
        """
        content = {
            "format": FORMAT,
            "step": self.step,
            "layout": self.layout,
            "versions": dict(self.versions),
            "files": {
                name: {"bytes": found.bytes, _CHECKSUM: found.checksum} for name, found in sorted(self.files.items())
            },
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> CheckpointManifest:
        """Read what ``write`` wrote.

        Raises:
            OSError: there is none, or it cannot be read.
            ValueError: it is no manifest, or one of another format.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"it has format {content['format']}, and this version reads format {FORMAT}")
            files = {name: FileSum(entry["bytes"], entry[_CHECKSUM]) for name, entry in content["files"].items()}
            return cls(content["step"], content["layout"], files, content["versions"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"it is no manifest ({type(error).__name__}: {error})") from None


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that a checkpoint's content depends on."""
    return {name: importlib.metadata.version(name) for name in ("megatron-rlpt", "megatron-core", "torch")}


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, FileSum]:
    """Size and checksum of every file, by name relative to ``folder``.

    Raises:
        OSError: one cannot be read.
    """
    names = list(names)
    return dict(zip(names, _map(lambda name: FileSum.of(folder / name), names), strict=True))


def share_of(files: Mapping[str, FileSum], rank: int, size: int) -> dict[str, FileSum]:
    """The files that ``rank`` of ``size`` looks after: about as many bytes for each, the same answer everywhere."""
    load, share = [0] * size, {}
    for name, found in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = load.index(min(load))
        load[least] += found.bytes
        if least == rank:
            share[name] = found
    return share


def wrong_sizes(folder: Path, files: Mapping[str, FileSum]) -> list[str]:
    """What is missing or not of its size, one phrase a file; costs no reading."""

    def look(name: str) -> str | None:
        try:
            size = os.stat(folder / name).st_size
        except FileNotFoundError:
            return f"{folder / name} is missing"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        expected = files[name].bytes
        return None if size == expected else f"{folder / name} has {size} bytes instead of {expected}"

    return _phrases(look, files)


def wrong_contents(folder: Path, files: Mapping[str, FileSum]) -> list[str]:
    """What cannot be read or has another checksum, one phrase a file; reads every byte."""

    def look(name: str) -> str | None:
        try:
            found = FileSum.of(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        return None if found == files[name] else f"{folder / name} has changed since it was written (checksum)"

    return _phrases(look, files)


def summary(phrases: list[str]) -> str:
    """The first few phrases and how many more there are, for a message of one line."""
    rest = len(phrases) - _NAMED
    return "; ".join(phrases[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _phrases(look: Callable[[str], str | None], files: Mapping[str, FileSum]) -> list[str]:
    return [phrase for phrase in _map(look, sorted(files)) if phrase is not None]


def _map(work: Callable[[str], T], names: list[str]) -> list[T]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(work, names))
