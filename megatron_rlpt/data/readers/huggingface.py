"""Stream datasets with the Hugging Face ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from megatron_rlpt.config import SourceConfig
from megatron_rlpt.data.readers.documents import (
    MAX_RECORD_BYTES,
    BadRecord,
    Document,
    MissingFieldError,
    Position,
    Reader,
    as_document,
    excerpt_of,
    pick,
    shown,
)
from megatron_rlpt.errors import DataError

MINIMUM = (5, 0, 1)
"""Minimum release of ``datasets``: the stream state of 5.0.0 does not advance."""

REQUIREMENT = f"datasets>={'.'.join(map(str, MINIMUM))}"

_NEAR = 4096
"""Maximum records to skip one by one; beyond that, opening the stream again is cheaper."""


def version_problem(version: str) -> str | None:
    """Return an error about a release of ``datasets``, or None."""
    from packaging.version import InvalidVersion, Version  # comes with datasets

    try:
        if Version(version).release >= MINIMUM:
            return None
    except InvalidVersion:
        pass
    return f"datasets {version} does not advance the stream state to resume from; {REQUIREMENT} is needed"


class HuggingFaceReader(Reader):
    """Reads one document per row of a streamed split. Position: row and stream state of the library.

    A failure inside the library (damaged shard, lost connection) stops the run instead of counting as a malformed
    record, because the library cannot continue after it.

    Raises:
        DataError: ``datasets`` is not installed or too old; the dataset, subset or split cannot be opened; the stream
            state does not advance; or streaming fails.
    """

    def __init__(self, source: SourceConfig, limit: int = MAX_RECORD_BYTES) -> None:
        self._source = source
        self._limit = limit
        self._dataset = _open(source)
        self._start: dict[str, Any] = self._dataset.state_dict()
        self._rows: Iterator[dict[str, Any]] | None = None
        self._row = 0
        self._state: dict[str, Any] | None = self._start
        """Stream state at ``_row``; None if not yet requested from the library, which copies it."""
        self._known = (0, self._start)
        """Last row with a known stream state; the state of another row must differ."""
        self._require_resumable()

    @override
    def read(self) -> Document | BadRecord | None:
        row, record = self._row, self._next()
        if record is None:
            return None
        path, field = self._source.path, self._source.field
        try:
            text = pick(record, field)
        except MissingFieldError as error:
            return BadRecord(path, row, excerpt_of(str(error)), excerpt_of(repr(record)))
        return as_document(text, f"{self._source.split}#{row}", path, row, field, self._limit)

    @override
    def skip(self) -> bool:
        return self._next() is not None

    @property
    @override
    def position(self) -> Position:
        if self._state is None:
            self._state = self._dataset.state_dict()
            row, state = self._known
            if row != self._row and state == self._state:
                raise self._frozen()
            self._known = (self._row, self._state)
        return [self._row, self._state]

    @override
    def seek(self, position: Position) -> None:
        row, state = position
        if self._rows is not None and 0 <= row - self._row <= _NEAR:
            while self._row < row:
                if self._next() is None:
                    raise DataError(f"data source {shown(self._source.path)!r} has fewer rows than before; restore it")
            return
        self._rows = None
        self._row, self._state = row, state

    @override
    def rewind(self) -> None:
        self._rows = None
        self._row, self._state = 0, self._start

    @override
    def layout(self) -> dict[str, Any]:
        source = self._source
        return {
            "format": "hf",
            "subset": source.subset,
            "split": source.split,
            "field": source.field,
            "files": self._dataset.num_shards,
        }

    def _require_resumable(self) -> None:
        """Read two rows, return to the state between them, and read the second row again.

        Raises:
            DataError: the stream state does not advance, or restores another row.
        """
        first = self._next()
        between = self.position
        second = self._next()
        if first is not None and second is not None:
            _ = self.position
            self._rows = None
            self._row, self._state = between
            if repr(self._next()) != repr(second):
                raise self._frozen()
        self.rewind()

    def _next(self) -> dict[str, Any] | None:
        try:
            if self._rows is None:
                self._dataset.load_state_dict(self._state)
                self._rows = iter(self._dataset)
            record = next(self._rows, None)
        except Exception as error:
            raise _failed(self._source, error, f"row {self._row} cannot be streamed") from None
        if record is not None:
            self._row += 1
            self._state = None
        return record

    def _frozen(self) -> DataError:
        return DataError(
            f"data source {shown(self._source.path)!r} (format hf): the stream state to resume from does not "
            f"advance at row {self._row}; update datasets, or store the source as JSON Lines or Parquet files"
        )


def _open(source: SourceConfig) -> Any:
    """Open the split as a stream."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data source {shown(source.path)!r} (format hf) needs the datasets package; install it"
        ) from None
    problem = version_problem(datasets.__version__)
    if problem is not None:
        raise DataError(f"data source {shown(source.path)!r} (format hf): {problem}; pip install '{REQUIREMENT}'")
    try:
        return datasets.load_dataset(source.path, source.subset or None, split=source.split, streaming=True)
    # The library raises a dozen unrelated types here.
    except Exception as error:
        raise _failed(source, error, _advice(source, datasets)) from None


def _advice(source: SourceConfig, datasets: Any) -> str:
    """Return advice that lists the available subsets or splits."""
    try:
        subsets = datasets.get_dataset_config_names(source.path)
        if (source.subset and source.subset not in subsets) or (not source.subset and len(subsets) > 1):
            return f"set the source's subset to one of {', '.join(map(shown, subsets))}"
        splits = datasets.get_dataset_split_names(source.path, source.subset or None)
    except Exception:  # the dataset itself cannot be reached
        return "check path, subset, split and network"
    return f"set the source's split to one of {', '.join(map(shown, splits))}"


def _failed(source: SourceConfig, error: Exception, hint: str) -> DataError:
    line = (str(error).strip().splitlines() or [""])[0]
    subset = f", subset {source.subset!r}" if source.subset else ""
    return DataError(
        f"data source {shown(source.path)!r} (format hf{subset}, split {source.split!r}): {type(error).__name__}: "
        f"{excerpt_of(line)}; {hint}"
    )
