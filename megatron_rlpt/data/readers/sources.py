"""Open the reader of a configured source."""

from __future__ import annotations

from megatron_rlpt.config import SourceConfig, SourceFormat
from megatron_rlpt.config.sources import unused_option
from megatron_rlpt.data.readers.documents import MAX_RECORD_BYTES, Reader, shown
from megatron_rlpt.data.readers.extension import ExtensionReader
from megatron_rlpt.data.readers.files import find_files
from megatron_rlpt.data.readers.huggingface import HuggingFaceReader
from megatron_rlpt.data.readers.indexed import IndexedReader, holds_tokens
from megatron_rlpt.data.readers.jsonl import JsonlReader
from megatron_rlpt.data.readers.parquet import ParquetReader
from megatron_rlpt.data.readers.prompts import PromptEncoder, PromptReader
from megatron_rlpt.data.readers.text import TextReader
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.tokens.tokenizer import Vocabulary


def open_source(source: SourceConfig, limit: int = MAX_RECORD_BYTES, vocabulary: Vocabulary | None = None) -> Reader:
    """Return a reader at the first record of ``source``.

    Args:
        source: configured source.
        limit: bytes above which a record is malformed.
        vocabulary: vocabulary of the policy, for sources that hold tokens or prompts.

    Raises:
        ModelError: the policy cannot be given prompts.
        DataError: the path is missing or empty, the format is not recognized, or its package is not installed.
        ConfigError: an option is set that has no effect in the detected format.
    """
    if source.reader:
        return ExtensionReader(source, limit)
    if source.format == SourceFormat.hf:
        return HuggingFaceReader(source, limit)
    if holds_tokens(source):
        _require_used(source, SourceFormat.megatron)
        if vocabulary is None:
            raise ValueError("an indexed dataset cannot be read without a vocabulary")
        return IndexedReader(source, vocabulary)
    files = find_files(source)
    _require_used(source, files.format)
    if source.prompts:
        if vocabulary is None:
            raise ValueError("prompts cannot be read without a vocabulary")
        return PromptReader(files, PromptEncoder(vocabulary), limit)
    match files.format:
        case SourceFormat.jsonl:
            return JsonlReader(files, source.field, limit)
        case SourceFormat.parquet:
            return ParquetReader(files, source.field, limit)
        case _:
            return TextReader(files, limit)


def _require_used(source: SourceConfig, format: SourceFormat) -> None:
    if (problem := unused_option(source, [format])) is not None:
        raise ConfigError(f"data source {shown(source.path)!r}: {problem}")
