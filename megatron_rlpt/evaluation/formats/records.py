"""Records of JSON Lines, JSON, CSV and Parquet files; errors name the file, the record and the field."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.data.readers.compression import compression_of, open_bytes
from megatron_rlpt.errors import DataError, first_line
from megatron_rlpt.plain_text import shortened

_CSV_FIELD = 1 << 24
"""Most characters of one CSV field; Python's default of 131,072 is less than some documents have."""


@dataclass(frozen=True)
class Row:
    """One record of a file."""

    path: Path
    number: int
    """From 1."""
    values: Mapping[str, Any]

    def text(self, *fields: str) -> str:
        """Return the text of the first of ``fields`` that the record has; dots lead into nested records.

        Raises:
            DataError: the record has none of them, or the value is not a text with visible characters.
        """
        value = self.value(*fields)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"has no text in {fields[0]!r}")
        return self._unicode(value, fields[0])

    def optional(self, *fields: str) -> str:
        """Return the text of the first of ``fields`` that the record has, or an empty text."""
        value = self._find(fields)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(f"has {shortened(repr(value), 40)} in {fields[0]!r}, which needs to be a text")
        return self._unicode(value, fields[0])

    def value(self, *fields: str) -> Any:
        """Return the value of the first of ``fields`` that the record has.

        Raises:
            DataError: it has none of them.
        """
        value = self._find(fields)
        if value is None:
            raise self.error(f"has no {fields[0]!r} (it has {', '.join(map(str, self.values)) or 'nothing'})")
        return value

    def texts(self, field: str) -> list[str]:
        """Return the list of texts in ``field``.

        Raises:
            DataError: there is no such list, it is empty, or an item is no text.
        """
        values = self.value(field)
        if not isinstance(values, list | tuple) or not values or not all(isinstance(one, str) for one in values):
            raise self.error(f"has no list of texts in {field!r}")
        return [self._unicode(one, field) for one in values]

    def error(self, problem: str) -> DataError:
        """Return an error about this record: ``problem`` completes "record 3"."""
        return DataError(f"{self.path}: record {self.number} {problem}")

    def _find(self, fields: Sequence[str]) -> Any:
        for field in fields:
            node: Any = self.values
            for part in [field] if field in self.values else field.split("."):
                node = node.get(part) if isinstance(node, Mapping) else None
            if node is not None:
                return node
        return None

    def _unicode(self, text: str, field: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.error(f"has half a character (a lone surrogate) in {field!r}; remove it") from None
        return text


def locate(path: Path, names: Sequence[str], fetch: str) -> list[Path]:
    """Return the files to read: ``path`` itself, or the first of ``names`` (globs) that the folder ``path`` has.

    Args:
        path: file or folder that the user named.
        names: names of the published files, relative to the folder, the preferred one first.
        fetch: imperative sentence that says what to fetch.

    Raises:
        DataError: there is no such file or folder, or the folder has none of ``names``.
    """
    if path.is_dir():
        for name in names:
            if found := sorted(one for one in path.glob(name) if one.is_file()):
                return found
        raise DataError(f"{path} has none of {', '.join(names)}: {_spoken(fetch)}")
    if not path.exists():
        raise DataError(f"{path} does not exist: {_spoken(fetch)}")
    return [path]


def read_rows(path: Path, fetch: str) -> list[Row]:
    """Return every record of a JSON Lines, JSON (array), CSV or Parquet file; the first may be compressed.

    Raises:
        DataError: the file cannot be read, is of another kind, is damaged, or is empty.
    """
    try:
        values = _parquet(path) if path.suffix.lower() == ".parquet" else _text_records(path)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} is damaged, or of another kind: {first_line(error)}; {_spoken(fetch)}") from None
    rows = [Row(path, number, one) for number, one in enumerate(values, 1)]
    for row in rows:
        if not isinstance(row.values, Mapping):
            raise row.error(f"is no object with fields; {_spoken(fetch)}")
    if not rows:
        raise DataError(f"{path} has no record; {_spoken(fetch)}")
    return rows


def read_lines(path: Path, fetch: str) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is blank.
    """
    try:
        lines = [line.strip() for line in _decoded(path).splitlines()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}; {_spoken(fetch)}") from None
    if not any(lines):
        raise DataError(f"{path} has no line; {_spoken(fetch)}")
    return [line for line in lines if line]


def _spoken(fetch: str) -> str:
    """``Fetch X.`` -> ``fetch X``, to end a line with."""
    return fetch[:1].lower() + fetch[1:].rstrip(".")


def _decoded(path: Path) -> str:
    with open_bytes(path) as stream:
        return stream.read().decode("utf-8-sig")


def _text_records(path: Path) -> list[Any]:
    text = _decoded(path)
    plain = path.with_suffix("") if compression_of(path) else path
    if plain.suffix.lower() in (".csv", ".tsv"):
        csv.field_size_limit(_CSV_FIELD)
        separator = "\t" if plain.suffix.lower() == ".tsv" else ","
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restval="", strict=True))
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return list(file.read().to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(first_line(error)) from None
