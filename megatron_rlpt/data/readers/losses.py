"""How much of a source cannot be read, in bytes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Losses:
    """What was found damaged in the files of one source.

    A file that breaks off does not tell how long it was. It is taken to have been as long as the whole files of the
    source are on average, and where there is none to compare with, as twice what is left of it.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes on disk of every file; empty where they are not known, as in a streamed dataset."""
    unread: dict[str, int] = field(default_factory=dict)
    """File -> bytes of it that cannot be read."""
    cut: list[str] = field(default_factory=list)
    """Files that break off."""

    def add(self, file: str, unread: int, cut: bool) -> None:
        """Note bytes of a file that cannot be read, and whether it breaks off."""
        self.unread[file] = min(self.unread.get(file, 0) + unread, self.sizes.get(file, unread))
        if cut and file not in self.cut:
            self.cut.append(file)

    @property
    def files(self) -> list[str]:
        """Files that something is lost of."""
        return list(dict.fromkeys([*self.unread, *self.cut]))

    def figures(self) -> tuple[int, int]:
        """Bytes lost, and bytes that the source should have."""
        known = [self.sizes[file] for file in self.cut if file in self.sizes]
        total, whole = sum(self.sizes.values()), len(self.sizes) - len(known)
        typical = (total - sum(known)) / whole if whole else None
        missing = sum(size if typical is None else max(0, round(typical - size)) for size in known)
        return sum(self.unread.values()) + missing, total + missing

    @property
    def share(self) -> float:
        """Share of the source that is lost; 0 where sizes are not known."""
        lost, total = self.figures()
        return lost / total if total else 0.0

    def describe(self, source: str, limit: float, what: str) -> str:
        """The error line for a source of which more than ``limit`` is lost."""
        lost, total = self.figures()
        return (
            f"{self.share:.1%} of data source {source!r} cannot be read (about {lost} of {total} bytes, in "
            f"{len(self.files)} of {len(self.sizes)} files; limit data.max_bad_fraction = {limit:.1%}); {what}; repair "
            "or copy the files again, or raise the limit"
        )
