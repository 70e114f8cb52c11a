"""The manifest of a checkpoint: every file with its size and checksum.

Checksums are 128-bit XXH3. They detect damage by disks, networks and incomplete copies, and are faster to compute than
a disk reads. They do not protect against deliberate manipulation.
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

from megatron_rlpt import __version__

T = TypeVar("T")

FORMAT = 1
"""Version of the checkpoint folder's format."""
_CHECKSUM = "xxh3_128"
_CHUNK = 4 << 20
_READERS = 4
"""Files read concurrently: one stream does not saturate a network file system or a fast disk."""
_NAMED = 3
"""Number of damaged files that a message names; it counts the others."""


@dataclass(frozen=True)
class FileSum:
    """Size and checksum of one file."""

    bytes: int
    checksum: str

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Compute the size and checksum of a file.

        Raises:
            OSError: the file is unreadable.
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
    """The content of ``manifest.json``."""

    step: int
    layout: str
    """Layout that it was saved under; any other layout can load it."""
    files: Mapping[str, FileSum]
    """By path relative to the checkpoint's folder; all files but the manifest and the marker."""
    versions: Mapping[str, str]
    """Versions of the packages that wrote it."""

    def write(self, path: Path) -> None:
        """Write the manifest as JSON.

        Raises:
            OSError: the file cannot be written.
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
        """Read a manifest.

        Raises:
            OSError: the file is missing or unreadable.
            ValueError: the file is not a manifest, or has another format.
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
    """Return the versions of the packages that a checkpoint's content depends on."""
    others = {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")}
    # This one may be used from a working tree, without having been installed.
    return {"megatron-rlpt": __version__, **others}


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, FileSum]:
    """Return size and checksum of files, by name relative to ``folder``.

    Raises:
        OSError: a file is unreadable.
    """
    names = list(names)
    return dict(zip(names, _map(lambda name: FileSum.of(folder / name), names), strict=True))


def share_of(files: Mapping[str, FileSum], rank: int, size: int) -> dict[str, FileSum]:
    """Return the files that ``rank`` of ``size`` checks: about the same number of bytes for every rank."""
    load, share = [0] * size, {}
    for name, found in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = load.index(min(load))
        load[least] += found.bytes
        if least == rank:
            share[name] = found
    return share


def wrong_sizes(folder: Path, files: Mapping[str, FileSum]) -> list[str]:
    """Return a phrase for each file that is missing or has the wrong size, without reading the files."""

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
    """Return a phrase for each file that is unreadable or has the wrong checksum."""

    def look(name: str) -> str | None:
        try:
            found = FileSum.of(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        return None if found == files[name] else f"{folder / name} has changed since it was written (checksum)"

    return _phrases(look, files)


def summary(phrases: list[str]) -> str:
    """Join the first few phrases and the number of the others into one line."""
    rest = len(phrases) - _NAMED
    return "; ".join(phrases[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _phrases(look: Callable[[str], str | None], files: Mapping[str, FileSum]) -> list[str]:
    return [phrase for phrase in _map(look, sorted(files)) if phrase is not None]


def _map(work: Callable[[str], T], names: list[str]) -> list[T]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(work, names))
