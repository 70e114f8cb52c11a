"""Which files a source consists of, and which format they are in."""

from __future__ import annotations

import glob
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config.schema import SourceConfig, SourceFormat
from megatron_rlpt.errors import DataError
from megatron_rlpt.records import stable_id

ENDINGS: dict[SourceFormat, tuple[str, ...]] = {
    SourceFormat.jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    SourceFormat.parquet: (".parquet",),
    SourceFormat.text: (".txt", ".md"),
}
"""Recognised file endings by format; upper case counts as lower case."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusFiles:
    """The files of one source in reading order (sorted by name), all of one format."""

    format: SourceFormat
    root: Path
    """Folder that names are relative to."""
    paths: tuple[Path, ...]

    def name(self, index: int) -> str:
        """Name of a file relative to the source, so that document ids survive a move of the whole corpus."""
        return _printable(self.paths[index].relative_to(self.root).as_posix())

    def layout(self) -> dict[str, Any]:
        """Number of files and a digest over their names and sizes in bytes.

        Raises:
            DataError: a file has vanished or is a link to nothing.
        """
        try:
            parts = [(self.name(index), path.stat().st_size) for index, path in enumerate(self.paths)]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}; check the file") from None
        return {"files": len(parts), "digest": stable_id(*parts)}


def find_files(source: SourceConfig) -> CorpusFiles:
    """List the files of a source that is not ``format: hf``.

    A file or a glob with an explicit format is taken as it is; from a folder, and with ``format: auto``, only files
    with a recognised ending are taken. Folders are searched recursively; hidden files and folders are left out.

    Raises:
        DataError: the path is missing or empty, or ``auto`` finds no recognised ending or more than one format.
    """
    root, paths, named = _list(source.path)
    if source.format != SourceFormat.auto:
        chosen = [path for path in paths if named or format_of(path) == source.format]
        if not chosen:
            raise DataError(
                f"data source {source.path!r} holds no {source.format.value} file; recognised endings: "
                f"{', '.join(ENDINGS[source.format])}"
            )
        return _corpus(source, source.format, root, paths, chosen)
    formats = {path: format_of(path) for path in paths}
    found = sorted({format.value for format in formats.values() if format is not None})
    recognised = ", ".join(ending for endings in ENDINGS.values() for ending in endings)
    if not found:
        raise DataError(
            f"data source {source.path!r} has no file with a recognised ending ({recognised}); rename the files or "
            "set the source's format"
        )
    if len(found) > 1:
        raise DataError(
            f"data source {source.path!r} mixes {' and '.join(found)} files (recognised endings: {recognised}); set "
            "the source's format or use a glob"
        )
    chosen = [path for path, format in formats.items() if format is not None]
    return _corpus(source, SourceFormat(found[0]), root, paths, chosen)


def format_of(path: Path) -> SourceFormat | None:
    """Format that the ending of a file name stands for; None if it is not a recognised one."""
    name = path.name.lower()
    for format, endings in ENDINGS.items():
        if name.endswith(endings):
            return format
    return None


def _corpus(
    source: SourceConfig, format: SourceFormat, root: Path, listed: list[Path], chosen: list[Path]
) -> CorpusFiles:
    if len(chosen) < len(listed):
        ignored = len(listed) - len(chosen)
        _log.info("data source %r: %d files that are not %s are left out", source.path, ignored, format.value)
    return CorpusFiles(format, root, tuple(sorted(chosen, key=lambda path: path.relative_to(root).as_posix())))


def _list(given: str) -> tuple[Path, list[Path], bool]:
    """Root, files, and whether the user named the files themselves (a file or a glob) rather than a folder."""
    path = Path(given)
    if not given.strip():
        raise DataError(f"data source path is {given!r}; give a file, a folder or a glob")
    if path.is_file():
        return path.parent, [path], True
    if path.is_dir():
        files = _walk(path)
        if not files:
            raise DataError(f"data source {given!r} is an empty folder; put data files there or correct the path")
        return path, files, False
    if not glob.has_magic(given):
        raise DataError(
            f"data source {given!r} does not exist; correct the path, or set format: hf for a dataset of the Hub"
        )
    files = [Path(match) for match in glob.glob(given, recursive=True) if Path(match).is_file()]
    if not files:
        raise DataError(f"data source {given!r} matches no file; correct the glob")
    plain: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        plain.append(part)
    return Path(*plain), files, True


def _walk(folder: Path) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files.extend(Path(parent, name) for name in names if not name.startswith("."))
    return files


def _printable(name: str) -> str:
    """File names may hold bytes that are not UTF-8; ids must be encodable."""
    return name.encode("utf-8", "backslashreplace").decode()
