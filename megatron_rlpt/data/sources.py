"""From a configured source to its reader."""

from __future__ import annotations

from megatron_rlpt.config.schema import SourceConfig, SourceFormat
from megatron_rlpt.data.documents import Reader
from megatron_rlpt.data.files import find_files
from megatron_rlpt.data.huggingface import HuggingFaceReader
from megatron_rlpt.data.jsonl import JsonlReader
from megatron_rlpt.data.parquet import ParquetReader
from megatron_rlpt.data.text import TextReader


def open_source(source: SourceConfig) -> Reader:
    """A reader at the first record of ``source``.

    Raises:
        DataError: path missing or empty, format not recognised, or a package that the format needs is missing.
    """
    if source.format == SourceFormat.hf:
        return HuggingFaceReader(source)
    files = find_files(source)
    match files.format:
        case SourceFormat.jsonl:
            return JsonlReader(files, source.field)
        case SourceFormat.parquet:
            return ParquetReader(files, source.field)
        case _:
            return TextReader(files)
