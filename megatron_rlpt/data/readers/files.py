"""Find the files of a source and their format."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.config import SourceConfig, SourceFormat
from megatron_rlpt.data.readers.compression import COMPRESSED, open_bytes
from megatron_rlpt.data.readers.documents import encodable, shown
from megatron_rlpt.data.readers.listing import Listing, SkippedFiles, list_file, list_folder, list_glob
from megatron_rlpt.errors import DataError
from megatron_rlpt.types import stable_id

ENDINGS: dict[SourceFormat, tuple[str, ...]] = {
    SourceFormat.jsonl: (".jsonl", ".ndjson", ".json"),
    SourceFormat.parquet: (".parquet",),
    SourceFormat.text: (".txt", ".md"),
}
"""Recognized file endings by format, in any case. All formats except Parquet may be compressed."""

_RECOGNISED = (
    f"{', '.join(ending for endings in ENDINGS.values() for ending in endings)}; all but Parquet also with "
    f"{', '.join(COMPRESSED)}"
)

_ABOUT_A_DATASET = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Metadata files that ``datasets`` writes next to documents."""

_TABLES = (".csv", ".tsv")

_NEXT_TO = " next to "

_ALONE = {
    "empty files": ("only empty files", "put documents there or remove the source"),
    "hidden files and folders": ("only hidden files and folders", "rename them without the dot in front"),
    "files about a dataset": ("only files about a dataset", "give the folder that holds its data"),
    "folders that the glob matches but does not enter": (
        "only folders",
        "end the glob with /** to read what they hold",
    ),
    "FIFOs, sockets and devices": ("no regular file but FIFOs, sockets or devices", "copy what they give into a file"),
}
"""Kind of skipped file -> description and advice for a source without other files."""


@dataclass(frozen=True)
class CorpusFiles:
    """Files of one source in reading order (sorted by name), all of one format."""

    format: SourceFormat
    root: Path
    """Base folder of names."""
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Bytes on disk of every file at the start of the run."""
    modified: tuple[int, ...]
    """Modification time of every file at the start of the run, in nanoseconds."""
    skipped: Mapping[str, SkippedFiles] = field(default_factory=dict)
    """Kind -> skipped files."""

    def name(self, index: int) -> str:
        """Return the name of a file relative to the source, so that document ids survive a move of the corpus."""
        return encodable(self.paths[index].relative_to(self.root).as_posix())

    def sizes_by_path(self) -> dict[str, int]:
        """Return the bytes on disk of every file by path."""
        return {str(path): size for path, size in zip(self.paths, self.sizes, strict=True)}

    def layout(self) -> dict[str, Any]:
        """Return the number of files and a digest of their names and sizes in bytes."""
        parts = [(self.name(index), size) for index, size in enumerate(self.sizes)]
        return {"files": len(parts), "digest": stable_id(*parts)}

    def open(self, index: int) -> io.BufferedReader:
        """Open a file as a decompressed byte stream.

        Raises:
            PermissionError: no permission to read the file.
            DataError: the file is missing or has changed since the start of the run, or the disk fails.
        """
        path = self.paths[index]
        try:
            stream = open_bytes(path)
        except PermissionError:
            raise
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be read: {error.strerror}; check the file") from None
        self.check_unchanged(index, stream)
        return stream

    def check_unchanged(self, index: int, stream: io.BufferedReader) -> None:
        """Compare size and modification time of an open file with those at the start of the run.

        Raises:
            DataError: the file has changed.
        """
        now = os.fstat(stream.fileno())
        then = (self.sizes[index], self.modified[index])
        if (now.st_size, now.st_mtime_ns) != then:
            raise DataError(
                f"{shown(self.paths[index])} has changed since the start of the run (size was {then[0]} bytes, is "
                f"{now.st_size}); restore the file and run the command again, or start a new run"
            )


def find_files(source: SourceConfig) -> CorpusFiles:
    """List the files of a source that is not ``format: hf``.

    A file or glob with an explicit format selects all its files; a folder or ``format: auto`` selects only files with a
    recognized ending. Folders are searched recursively; hidden files and folders are skipped.

    Raises:
        DataError: the path is missing or empty, or ``auto`` finds no recognized ending or more than one format.
    """
    listing = _list(source.path)
    formats = [format_of(file.path) for file in listing.files]
    wanted = source.format
    if wanted is SourceFormat.auto:
        found = sorted({format.value for format in formats if format is not None})
        if len(found) > 1:
            first = {format.value: file.path for file, format in zip(listing.files, formats, strict=True) if format}
            examples = ", ".join(shown(first[format].relative_to(listing.root)) for format in found)
            raise DataError(
                f"data source {shown(source.path)!r} mixes {' and '.join(found)} files (recognised endings: "
                f"{_RECOGNISED}; found among others: {examples}); set the source's format or use a glob"
            )
        wanted = SourceFormat(found[0]) if found else wanted
    anything = listing.named and source.format is not SourceFormat.auto
    chosen = []
    for file, format in zip(listing.files, formats, strict=True):
        if anything or format is wanted:
            chosen.append(file)
        else:
            listing.skip(_kind(file.path, format, wanted), file.path)
    if not chosen:
        raise DataError(_nothing_to_read(source, listing))
    dangling = [file for file in chosen if file.size < 0]
    if dangling:
        raise DataError(
            f"{shown(dangling[0].path)} is a broken link ({len(dangling)} of {len(chosen)} files of data source "
            f"{shown(source.path)!r} are); restore the target or remove the link"
        )
    return CorpusFiles(
        wanted,
        listing.root,
        tuple(file.path for file in chosen),
        tuple(file.size for file in chosen),
        tuple(file.modified for file in chosen),
        listing.skipped,
    )


def format_of(path: Path) -> SourceFormat | None:
    """Return the format for the ending of a file name; None if the ending is not recognized."""
    name = path.name.lower()
    if name in _ABOUT_A_DATASET:
        return None
    ending = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    for format, endings in ENDINGS.items():
        if name.removesuffix(ending).endswith(endings) and not (ending and format is SourceFormat.parquet):
            return format
    return None


def _kind(path: Path, format: SourceFormat | None, wanted: SourceFormat) -> str:
    """Return the kind of a skipped file."""
    if format is not None:
        return f"{format.value} files{_NEXT_TO}{wanted.value}"
    if path.name.lower() in _ABOUT_A_DATASET:
        return "files about a dataset"
    ending = shown(path.suffix.lower())
    return f"files ending in {ending}" if ending else "files without an ending"


def _nothing_to_read(source: SourceConfig, listing: Listing) -> str:
    where = f"data source {shown(source.path)!r}"
    # Without files of the wanted format, drop the reference to it.
    others = {kind.partition(_NEXT_TO)[0]: entry for kind, entry in listing.skipped.items()}
    if not others and listing.named:
        return f"{where} matches no file; correct the glob"
    if not others:
        return f"{where} is an empty folder; put data files there or correct the path"
    if len(others) == 1 and (only := next(iter(others))) in _ALONE:
        what, advice = _ALONE[only]
        return f"{where} has {what} ({others[only]}); {advice}"
    if any(kind.endswith(_TABLES) for kind in others):
        advice = "CSV and TSV are not supported, convert them to JSON Lines or Parquet"
    elif source.format is SourceFormat.auto:
        advice = "rename the files or set the source's format"
    else:
        advice = "correct the path or the format"
    auto = source.format is SourceFormat.auto
    wanted = f"file with a recognised ending ({_RECOGNISED})" if auto else f"{source.format.value} file"
    return f"{where} has no {wanted} but {'; '.join(f'{kind}: {entry}' for kind, entry in others.items())}; {advice}"


def _list(given: str) -> Listing:
    if not given.strip():
        raise DataError(f"data source path is {given!r}; give a file, a folder or a glob")
    if "\0" in given:
        raise DataError(f"data source path is {given!r}; a path cannot hold a null character")
    path = Path(given)
    try:
        if path.is_dir():
            return list_folder(path)
        if os.path.lexists(path):
            return list_file(path)
        if glob.has_magic(given):
            return list_glob(given)
    except OSError as error:
        raise DataError(f"data source {shown(given)!r} cannot be listed: {error.strerror}; correct the path") from None
    raise DataError(
        f"data source {shown(given)!r} does not exist; correct the path, or set format: hf for a dataset of the Hub"
    )
