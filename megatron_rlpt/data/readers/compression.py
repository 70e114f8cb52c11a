"""Open files as decompressed byte streams: ``.gz``, ``.zst``, ``.xz`` and ``.bz2`` with any number of parts."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from megatron_rlpt.data.readers.documents import shown
from megatron_rlpt.errors import DataError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
"""Recognized endings of compressed files, in any case."""

CHUNK = 1 << 17
"""Maximum bytes to decompress or read per call."""

_INPUT = 1 << 16
"""Compressed bytes to read per call."""

_XZ_MEMORY = 1 << 29
"""Memory limit of an ``.xz`` decoder; xz -9 needs 65 MiB, and a header may request 4 GiB."""


class CorruptStreamError(Exception):
    """Damaged or truncated data in a file."""

    def __init__(self, reason: str, unread: int = 0, cut: bool = False) -> None:
        super().__init__(reason)
        self.unread = unread
        """Bytes of the file that could not be decompressed."""
        self.cut = cut
        """Whether the file is truncated, so that an unknown number of bytes is missing in addition."""


class _Codec(Protocol):
    """Decoder of one compressed stream with bounded output per call, as in ``lzma`` and ``bz2``."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


def compression_of(path: Path) -> str | None:
    """Return the compression ending of a file name, or None."""
    ending = path.suffix.lower()
    return ending if ending in COMPRESSED else None


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; decompress it according to its ending.

    Other kinds of file are refused: opening a FIFO blocks, and opening a device may have effects.

    Raises:
        DataError: not a regular file, or the package for its compression is missing.
        OSError: the file cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{shown(path)} is not a regular file; remove it from the data or give another path")
    # O_NONBLOCK: a FIFO may have replaced the file since the check.
    raw = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    ending = compression_of(path)
    if ending is None:
        return io.BufferedReader(raw, CHUNK)
    return io.BufferedReader(_Decompressed(raw, *_codec(ending, path)), CHUNK)


def bytes_on_disk(stream: io.BufferedReader) -> int:
    """Return the bytes read of the underlying file; exact for a plain file, to ``CHUNK`` for a compressed one."""
    raw = stream.raw
    return raw.consumed if isinstance(raw, _Decompressed) else stream.tell()


def discard(stream: io.BufferedReader, count: int) -> None:
    """Skip ``count`` bytes.

    Raises:
        EOFError: the stream is shorter.
        CorruptStreamError: the file is damaged.
    """
    while count > 0:
        got = len(stream.read(min(count, CHUNK)))
        if not got:
            raise EOFError("it ends early")
        count -= got


class _Decompressed(io.RawIOBase):
    """Decompressed bytes of all parts of a file; the requested size bounds memory and work per call."""

    def __init__(
        self, raw: io.FileIO, codec: Callable[[], _Codec], errors: tuple[type[Exception], ...], padding: bytes
    ) -> None:
        self._raw = raw
        self._new_codec = codec
        self._errors = errors
        self._padding = padding
        self._codec: _Codec | None = None
        self._input = b""
        self._failure: CorruptStreamError | None = None

    @override
    def readable(self) -> bool:
        return True

    @override
    def fileno(self) -> int:
        return self._raw.fileno()

    @property
    def consumed(self) -> int:
        """Bytes of the file decompressed so far."""
        return self._raw.tell() - len(self._input)

    def readinto(self, target: Any) -> int:
        """Fill ``target``; return fewer bytes only at the end of the file.

        Raises:
            CorruptStreamError: the data is damaged or truncated; the bytes before the damage are returned first.
        """
        filled, size = 0, len(target)
        try:
            while self._failure is None and filled < size:
                out = self._next(size - filled)
                if out is None:
                    break
                target[filled : filled + len(out)] = out
                filled += len(out)
        except CorruptStreamError as error:
            self._failure = error
        if self._failure is not None and not filled:
            raise self._failure
        return filled

    @override
    def close(self) -> None:
        super().close()
        self._raw.close()

    def _next(self, most: int) -> bytes | None:
        """Return up to ``most`` bytes, possibly none; None at the end of the file."""
        if self._codec is None:
            self._input = self._input.lstrip(self._padding) if self._padding else self._input
            if not self._input:
                self._input = self._raw.read(_INPUT) or b""
                return b"" if self._input else None
            self._codec = self._new_codec()
        data = b""
        if self._codec.needs_input:
            data = self._input or self._raw.read(_INPUT) or b""
            self._input = b""
            if not data:
                raise CorruptStreamError("the file ends within its compressed data", cut=True)
        try:
            out = self._codec.decompress(data, most)
        except self._errors as error:
            unread = os.fstat(self._raw.fileno()).st_size - self._raw.tell() + len(data)
            raise CorruptStreamError(str(error) or type(error).__name__, unread) from None
        if self._codec.eof:
            self._input = self._codec.unused_data
            self._codec = None
        return out


class _GzipMember:
    """Adapter of zlib's decompressor to ``_Codec``."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        tail = self._member.unconsumed_tail
        out = self._member.decompress(tail + data if tail else data, max_length)
        self.needs_input = not self._member.unconsumed_tail and len(out) < max_length
        return out

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data


def _codec(ending: str, path: Path) -> tuple[Callable[[], _Codec], tuple[type[Exception], ...], bytes]:
    """Return a decoder factory, the errors it raises, and the padding allowed between two parts."""
    match ending:
        case ".gz":
            return _GzipMember, (zlib.error,), b"\0"
        case ".xz":
            return lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), (lzma.LZMAError,), b"\0"
        case ".bz2":
            return bz2.BZ2Decompressor, (OSError, ValueError), b""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise DataError(
                f"{shown(path)} needs the backports.zstd package; install it or decompress the file"
            ) from None
    return zstd.ZstdDecompressor, (zstd.ZstdError,), b""
