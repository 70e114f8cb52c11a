"""Find skipped and damaged files of a corpus before a run reads it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence

from megatron_rlpt.config import SourceConfig, SourceFormat
from megatron_rlpt.data.quarantine import Losses
from megatron_rlpt.data.readers.compression import CHUNK, CorruptStreamError, compression_of, open_bytes
from megatron_rlpt.data.readers.documents import shown
from megatron_rlpt.data.readers.files import CorpusFiles, find_files
from megatron_rlpt.data.readers.indexed import holds_tokens
from megatron_rlpt.data.readers.jsonl import Framing, framing_of
from megatron_rlpt.data.readers.listing import SkippedFiles
from megatron_rlpt.data.readers.parquet import MAGIC
from megatron_rlpt.errors import DataError
from megatron_rlpt.observe.log import get_logger

_MOST_FILES = 10_000
"""Maximum files to examine per source; of more files, an evenly spread sample."""

_EFFORT = 1 << 26
"""Compressed bytes of a source to decompress as a check; takes about a second."""

_COST = {".bz2": 16, ".xz": 4}
"""Time to decompress a byte, relative to gzip."""

_MOST_OUTPUT = 1 << 30
"""Maximum decompressed bytes to check in a file."""

_TAIL = 1 << 16
"""Bytes at the end of a file in which to search for the start of its last line."""

_HARMLESS = ("hidden files and folders", "files about a dataset", "other names of files that are read")

_log = get_logger(__name__)


def survey_corpus(sources: Sequence[SourceConfig], max_bad_fraction: float) -> None:
    """Log skipped files of the sources, and find damage that does not require reading everything.

    Finds files without read permission, Parquet files without a footer, plain JSON files that end within a line or an
    array, and damaged compressed files (as many as take about a second to decompress).

    Raises:
        DataError: a source has no file, or its lost share is above ``max_bad_fraction``.
    """
    for source in sources:
        if source.reader or source.format == SourceFormat.hf or holds_tokens(source):
            continue  # the reader finds the damage
        files = find_files(source)
        for kind, entry in files.skipped.items():
            log = _log.info if kind in _HARMLESS else _log.warning
            log("not read", source=shown(source.path), what=kind, count=entry.count, examples=str(entry))
        losses = Losses(files.sizes_by_path())
        damaged: dict[str, SkippedFiles] = {}
        for path, reason, unread, cut in _damage(files):
            losses.add(path, unread, cut)
            entry = damaged.setdefault(reason, SkippedFiles())
            entry.add(path)
        for reason, entry in damaged.items():
            share = losses.share
            _log.warning("damaged", source=shown(source.path), what=reason, count=entry.count, examples=str(entry),
                         share_of_source=share)  # fmt: skip
        if losses.share > max_bad_fraction:
            what = "; ".join(f"{reason}: {entry}" for reason, entry in damaged.items())
            raise DataError(losses.describe(shown(source.path), max_bad_fraction, what))


def _damage(files: CorpusFiles) -> Iterator[tuple[str, str, int, bool]]:
    """Yield path, kind of damage, unreadable bytes and whether the file is truncated, for every damaged file."""
    effort = _EFFORT
    for index in range(0, len(files.paths), -(-len(files.paths) // _MOST_FILES)):
        path, size = files.paths[index], files.sizes[index]
        ending = compression_of(path)
        cost = size * _COST.get(ending or "", 1)
        try:
            if not os.access(path, os.R_OK):
                yield str(path), "files that may not be read", size, False
                continue
            if files.format is SourceFormat.text and ending is None:
                continue
            with open_bytes(path) as stream:
                if files.format is SourceFormat.parquet:
                    if _last(stream, size, len(MAGIC)) != MAGIC:
                        yield str(path), "files that end without a Parquet footer", size, True
                elif ending is None:
                    if _is_truncated(stream, size, path.name):
                        yield str(path), "files that end within a record", 0, True
                elif cost <= effort:
                    effort -= cost
                    _drain(stream)
        except CorruptStreamError as error:
            what = "files that end within their compressed data" if error.cut else "files whose compression is damaged"
            yield str(path), what, error.unread, error.cut
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}; check the file") from None


def _drain(stream: io.BufferedReader) -> None:
    left = _MOST_OUTPUT
    while left > 0 and (got := len(stream.read(CHUNK))):
        left -= got


def _is_truncated(stream: io.BufferedReader, size: int, name: str) -> bool:
    """Return whether a plain JSON file ends within a line or an array."""
    framing = framing_of(stream.peek(1), name)
    tail = _last(stream, size, _TAIL)
    if framing is Framing.array:
        return not tail.rstrip().endswith(b"]")
    if framing is Framing.values or tail.endswith(b"\n") or (b"\n" not in tail and size > len(tail)):
        return False
    try:
        json.loads(tail.rpartition(b"\n")[2])
    except (ValueError, RecursionError):
        return True
    return False


def _last(stream: io.BufferedReader, size: int, count: int) -> bytes:
    stream.seek(max(0, size - count))
    return stream.read(count)
