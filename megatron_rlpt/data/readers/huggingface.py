"""Datasets that the Hugging Face ``datasets`` library can stream."""

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
"""Oldest release of ``datasets`` that is used: 5.0.0 gives out one stream state for ever."""

REQUIREMENT = f"datasets>={'.'.join(map(str, MINIMUM))}"

_NEAR = 4096
"""Records ahead up to which passing over them costs less than opening the stream again."""


def version_problem(version: str) -> str | None:
    """What is wrong with a release of ``datasets``, or None."""
    from packaging.version import InvalidVersion, Version  # comes with datasets

    try:
        if Version(version).release >= MINIMUM:
            return None
    except InvalidVersion:
        pass
    return f"datasets {version} does not advance the position that a run resumes from; {REQUIREMENT} is needed"


class HuggingFaceReader(Reader):
    """One document per row of a streamed split. Position: row, and the library's own stream state.

    A failure inside the library (damaged shard, lost connection) ends the run rather than a record, because the
    library cannot go on behind it.

    Raises:
        DataError: ``datasets`` is not installed or too old, the dataset, subset or split cannot be opened, its stream
            state does not advance, or streaming fails.
    """

    def __init__(self, source: SourceConfig, limit: int = MAX_RECORD_BYTES) -> None:
        self._source = source
        self._limit = limit
        self._dataset = _open(source)
        self._start: dict[str, Any] = self._dataset.state_dict()
        self._rows: Iterator[dict[str, Any]] | None = None
        self._row = 0
        self._state: dict[str, Any] | None = self._start
        """Stream state at ``_row``; None where it has to be asked for, which copies it."""
        self._known = (0, self._start)
        """A row and its stream state: at another row it must be another."""
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
                    raise DataError(
                        f"data source {shown(self._source.path)!r} is shorter than when it was read before; restore it"
                    )
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
        """Read two rows, go back between them, and get the second one again.

        Raises:
            DataError: the state of the stream stands still, or leads somewhere else.
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
            f"data source {shown(self._source.path)!r} (format hf): the position that a run resumes from does not "
            f"advance at row {self._row}; update datasets, or store the source as JSON Lines or Parquet files"
        )


def _open(source: SourceConfig) -> Any:
    """The split as a stream."""
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
    # The library raises a dozen unrelated types here; each means that the dataset cannot be opened.
    except Exception as error:
        raise _failed(source, error, _advice(source, datasets)) from None


def _advice(source: SourceConfig, datasets: Any) -> str:
    """What there is instead of a subset or split that cannot be opened."""
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
