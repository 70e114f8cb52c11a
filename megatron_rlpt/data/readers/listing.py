"""List the regular files in a folder or matching a glob, each once, and everything skipped."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rlpt.data.readers.documents import shown

EXAMPLES = 3
"""Maximum example names of every kind of skipped file."""


@dataclass
class SkippedFiles:
    """Count and examples of one kind of skipped file."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str | os.PathLike[str]) -> None:
        """Count a file or folder."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(shown(name))

    def __str__(self) -> str:
        rest = self.count - len(self.examples)
        return ", ".join(self.examples) + (f" and {rest} more" if rest else "")


@dataclass(frozen=True)
class FoundFile:
    """A regular file, or a broken link (size -1)."""

    path: Path
    size: int
    """Bytes on disk."""
    modified: int
    """Modification time in nanoseconds."""


@dataclass
class Listing:
    """Contents of a folder or matches of a glob."""

    root: Path
    """Base folder of names."""
    named: bool = False
    """Whether the path names files (a file or a glob) rather than a folder."""
    files: list[FoundFile] = field(default_factory=list)
    """Non-empty regular files, sorted by name; each once, regardless of links to it."""
    skipped: dict[str, SkippedFiles] = field(default_factory=dict)
    """Kind -> skipped files."""

    def skip(self, kind: str, path: str | os.PathLike[str]) -> None:
        """Record a skipped file or folder."""
        self.skipped.setdefault(kind, SkippedFiles()).add(os.path.relpath(path, self.root))


def list_file(path: Path) -> Listing:
    """List a single file."""
    listing = Listing(path.parent, named=True)
    _take(listing, [str(path)])
    return listing


def list_folder(folder: Path) -> Listing:
    """List everything in a folder that is not hidden; follow links to folders, and read every folder once."""
    listing = Listing(folder)
    _take(listing, _below(listing, str(folder), set()))
    return listing


def list_glob(pattern: str) -> Listing:
    """List the matches of a glob like Python's ``glob`` with ``**``.

    Enter every folder only once, so that loops of links end; do not enter folders that the whole glob matches.
    """
    parts = Path(pattern).parts
    plain = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    listing = Listing(root, named=True)
    _take(listing, _matches(listing, str(root), parts[plain:], set()))
    return listing


def _take(listing: Listing, paths: Iterator[str] | list[str]) -> None:
    """Add the regular files among ``paths`` to the listing, each under one name."""
    by_identity: dict[tuple[int, ...], list[str]] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            listing.files.append(FoundFile(Path(path), -1, 0))
            continue
        if not stat.S_ISREG(status.st_mode):
            folder = stat.S_ISDIR(status.st_mode)
            listing.skip(
                "folders that the glob matches but does not enter" if folder else "FIFOs, sockets and devices", path
            )
        elif not status.st_size:
            listing.skip("empty files", path)
        else:
            # Some file systems have no inode numbers, so compare size and time as well.
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            by_identity.setdefault(identity, []).append(path)
    for (_, _, size, modified), names in by_identity.items():
        if len(names) > 1:
            names.sort(key=lambda name: (os.path.islink(name), name))
            for other in names[1:]:
                listing.skip("other names of files that are read", other)
        listing.files.append(FoundFile(Path(names[0]), size, modified))
    listing.files.sort(key=lambda file: str(file.path))


def _below(listing: Listing, top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the files below ``top``; links to folders come last, so that a folder is read under its real name."""
    pending, links = deque([top]), deque[str]()
    while pending or links:
        folder = pending.popleft() if pending else links.popleft()
        for entry in _entries(listing, folder, seen):
            if entry.name.startswith("."):
                listing.skip("hidden files and folders", entry.path)
            elif _is_folder(entry):
                (links if entry.is_symlink() else pending).append(entry.path)
            else:
                yield entry.path


def _matches(
    listing: Listing, folder: str, parts: tuple[str, ...], seen: set[tuple[int, int, tuple[str, ...]]]
) -> Iterator[str]:
    """Yield the paths below ``folder`` that match ``parts``."""
    try:
        status = os.stat(folder)
    except OSError:
        return
    key = (status.st_dev, status.st_ino, parts)
    if key in seen:
        return
    seen.add(key)
    part, rest = parts[0], parts[1:]
    if part == "**" and not rest:
        yield from _below(listing, folder, set())
        return
    if part == "**":
        yield from _matches(listing, folder, rest, seen)
    elif not glob.has_magic(part):
        path = os.path.join(folder, part)
        if rest:
            yield from _matches(listing, path, rest, seen)
        elif os.path.lexists(path):
            yield path
        return
    if not stat.S_ISDIR(status.st_mode):
        return
    links = []
    for entry in _entries(listing, folder, None):
        if part == "**":
            if not entry.name.startswith(".") and _is_folder(entry):
                if entry.is_symlink():
                    links.append(entry.path)
                else:
                    yield from _matches(listing, entry.path, parts, seen)
        elif fnmatch.fnmatchcase(entry.name, part) and (part.startswith(".") or not entry.name.startswith(".")):
            if not rest:
                yield entry.path
            elif _is_folder(entry):
                yield from _matches(listing, entry.path, rest, seen)
    for link in links:
        yield from _matches(listing, link, parts, seen)


def _entries(listing: Listing, folder: str, seen: set[tuple[int, int]] | None) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name; none if it cannot be listed or is already in ``seen``."""
    try:
        if seen is not None:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                listing.skip("links to folders that are read already", folder)
                return []
            seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        listing.skip("folders that cannot be listed", folder)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
