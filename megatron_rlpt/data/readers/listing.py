"""Regular files below a folder or behind a glob, each once, and what was found there besides."""

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
"""Names kept of every kind of thing that is passed over."""


@dataclass
class PassedOver:
    """Things of one kind that are not read."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str | os.PathLike[str]) -> None:
        """Count one."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(shown(name))

    def __str__(self) -> str:
        rest = self.count - len(self.examples)
        return ", ".join(self.examples) + (f" and {rest} more" if rest else "")


@dataclass(frozen=True)
class FoundFile:
    """A regular file, or a link to nothing (size -1)."""

    path: Path
    size: int
    """Bytes on disk."""
    modified: int
    """Time of the last change, in nanoseconds."""


@dataclass
class Listing:
    """What lies below a folder or behind a glob."""

    root: Path
    """Folder that names are relative to."""
    named: bool = False
    """Whether the user named the files themselves (a file or a glob) rather than a folder."""
    files: list[FoundFile] = field(default_factory=list)
    """Regular files that are not empty, sorted by name; each once, whatever links lead to it."""
    passed_over: dict[str, PassedOver] = field(default_factory=dict)
    """Kind -> what is not read."""

    def pass_over(self, kind: str, path: str | os.PathLike[str]) -> None:
        """Note something that is not read."""
        self.passed_over.setdefault(kind, PassedOver()).add(os.path.relpath(path, self.root))


def list_file(path: Path) -> Listing:
    """A file that the user names."""
    listing = Listing(path.parent, named=True)
    _take(listing, [str(path)])
    return listing


def list_folder(folder: Path) -> Listing:
    """Everything below a folder but what is hidden; links to folders are followed, and every folder is read once."""
    listing = Listing(folder)
    _take(listing, _below(listing, str(folder), set()))
    return listing


def list_glob(pattern: str) -> Listing:
    """What a glob matches, as Python's ``glob`` with ``**`` but every folder once, so that loops of links end.

    Folders that it matches are not entered.
    """
    parts = Path(pattern).parts
    plain = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    listing = Listing(root, named=True)
    _take(listing, _matches(listing, str(root), parts[plain:], set()))
    return listing


def _take(listing: Listing, paths: Iterator[str] | list[str]) -> None:
    """Keep the regular files among ``paths``, one name of each."""
    by_identity: dict[tuple[int, ...], list[str]] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            listing.files.append(FoundFile(Path(path), -1, 0))
            continue
        if not stat.S_ISREG(status.st_mode):
            folder = stat.S_ISDIR(status.st_mode)
            listing.pass_over(
                "folders that the glob matches but does not enter" if folder else "FIFOs, sockets and devices", path
            )
        elif not status.st_size:
            listing.pass_over("empty files", path)
        else:
            # Some file systems have no numbers of their own, so size and time have to agree as well.
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            by_identity.setdefault(identity, []).append(path)
    for (_, _, size, modified), names in by_identity.items():
        if len(names) > 1:
            names.sort(key=lambda name: (os.path.islink(name), name))
            for other in names[1:]:
                listing.pass_over("other names of files that are read", other)
        listing.files.append(FoundFile(Path(names[0]), size, modified))
    listing.files.sort(key=lambda file: str(file.path))


def _below(listing: Listing, top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files below ``top``. Links to folders come last, so that a folder keeps its own name if it has one."""
    pending, links = deque([top]), deque[str]()
    while pending or links:
        folder = pending.popleft() if pending else links.popleft()
        for entry in _entries(listing, folder, seen):
            if entry.name.startswith("."):
                listing.pass_over("hidden files and folders", entry.path)
            elif _is_folder(entry):
                (links if entry.is_symlink() else pending).append(entry.path)
            else:
                yield entry.path


def _matches(
    listing: Listing, folder: str, parts: tuple[str, ...], seen: set[tuple[int, int, tuple[str, ...]]]
) -> Iterator[str]:
    """Paths below ``folder`` that match ``parts``."""
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
    """What a folder holds, by name; nothing if it cannot be listed or, given ``seen``, was listed before."""
    try:
        if seen is not None:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                listing.pass_over("links to folders that are read already", folder)
                return []
            seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        listing.pass_over("folders that cannot be listed", folder)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
