"""Small corpora in every format, and a tokenizer, for the tests of the data package."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from backports import zstd

from megatron_rlpt.config import DataConfig, SourceConfig, SourceFormat

FILE_FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "ndjson.xz", "jsonl.bz2", "json", "json.gz", "parquet", "txt")


def encode(text: str, control_tokens: bool = False) -> list[int]:
    """One token per byte, so that a test can turn tokens back into text."""
    return list(text.encode())


def decode(tokens: tuple[int, ...]) -> str:
    return bytes(tokens).decode()


def story(name: str, index: int, length: int = 24) -> str:
    """A text of ``length`` bytes that names itself."""
    return f"{name}{index:03d}:".ljust(length, "abcdefghijklmnop"[index % 16])[:length]


def jsonl_bytes(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": index}).encode() + b"\n" for index, text in enumerate(texts))


def write(folder: Path, kind: str, texts: list[str], files: int = 1) -> Path:
    """Write ``texts`` as ``files`` files of one kind, in reading order, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(texts) // files)
    for number in range(files):
        part = texts[number * size : (number + 1) * size]
        path = folder / f"part-{number:02d}.{kind}"
        match kind:
            case "jsonl":
                path.write_bytes(jsonl_bytes(part))
            case "jsonl.gz":
                path.write_bytes(gzip.compress(jsonl_bytes(part)))
            case "jsonl.zst":
                # Two frames, as tools that compress in parallel write them.
                half = len(part) // 2
                frames = (jsonl_bytes(part[:half]), jsonl_bytes(part[half:]))
                path.write_bytes(b"".join(zstd.compress(frame) for frame in frames))
            case "ndjson.xz":
                path.write_bytes(lzma.compress(jsonl_bytes(part)) + bytes(8))
            case "jsonl.bz2":
                path.write_bytes(bz2.compress(jsonl_bytes(part)))
            case "json":
                path.write_text(json.dumps([{"text": text, "more": [{"n": "]"}]} for text in part], indent=1))
            case "json.gz":
                path.write_bytes(gzip.compress(b"[" + b",".join(jsonl_bytes(part).splitlines()) + b"]\n"))
            case "parquet":
                pq.write_table(pa.table({"n": list(range(len(part))), "text": part}), path, row_group_size=3)
            case _:
                for index, text in enumerate(part):
                    (folder / f"doc-{number:02d}-{index:04d}.{kind}").write_text(text)
    return folder


def source(path: Path, weight: float = 1.0, format: str = "auto", field: str = "text") -> SourceConfig:
    return SourceConfig(path=str(path), weight=weight, format=SourceFormat(format), field=field)


def settings(*sources: SourceConfig, buffer: int = 1, **overrides) -> DataConfig:
    values = {"suffix_length": 4, "max_prefix": 8, "min_prefix": 4, "shuffle_buffer": buffer} | overrides
    return DataConfig(sources=list(sources), **values)
