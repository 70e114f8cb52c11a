"""A data source: one column of a CSV file."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

from megatron_rlpt.types import Failed


class CsvColumn:
    """Read the documents in ``column`` of the CSV file at ``path``."""

    version = "1"

    def __init__(self, path: str, column: str = "text", delimiter: str = ",") -> None:
        self.path, self.column, self.delimiter = Path(path), column, delimiter

    def records(self, start: int) -> Iterator[str | Failed]:
        """Yield the text of row ``start`` and of all that follow; the same rows in the same order every time."""
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in itertools.islice(csv.DictReader(file, delimiter=self.delimiter), start, None):
                text = row.get(self.column)
                yield text if text is not None else Failed(f"no column {self.column!r}")
