"""Files as streams of bytes, decompressed on the way: ``.gz``, ``.zst``, ``.xz``, ``.bz2``, of any number of parts."""

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

from megatron_rlpt.data.readers.documents import shown
from megatron_rlpt.errors import DataError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
"""Recognised endings of compressed files; upper case counts as lower case."""

CHUNK = 1 << 17
"""Bytes decompressed or read at once."""

_INPUT = 1 << 16
"""Compressed bytes read at once."""

_XZ_MEMORY = 1 << 29
"""Most memory of an ``.xz`` decoder; xz -9 needs 65 MiB, and a header may ask for 4 GiB."""


class CorruptStreamError(Exception):
    """Compressed data that is damaged or ends early."""

    def __init__(self, reason: str, unread: int = 0, cut: bool = False) -> None:
        super().__init__(reason)
        self.unread = unread
        """Bytes of the file that could not be decompressed."""
        self.cut = cut
        """Whether the file ends in the middle, so that an unknown number of bytes is missing besides."""


class _Codec(Protocol):
    """One compressed stream, as ``lzma``, ``bz2`` and ``compression.zstd`` have it: bounded output on every call."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


def compression_of(path: Path) -> str | None:
    """The ending that says how a file is compressed, or None."""
    ending = path.suffix.lower()
    return ending if ending in COMPRESSED else None


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a regular file for reading, decompressed by its ending.

    Nothing but a regular file is ever opened: a FIFO would block for ever and a device may act on it.

    Raises:
        DataError: not a regular file, or a package is missing that its compression needs.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{shown(path)} is not a regular file; remove it from the data or name another")
    # A FIFO that took its place in the meantime would not block either.
    raw = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    ending = compression_of(path)
    if ending is None:
        return io.BufferedReader(raw, CHUNK)
    return io.BufferedReader(_Decompressed(raw, *_codec(ending, path)), CHUNK)


def bytes_on_disk(stream: io.BufferedReader) -> int:
    """How far the file beneath a stream has been read; exact for a plain file, to ``CHUNK`` for a compressed one."""
    raw = stream.raw
    return raw.consumed if isinstance(raw, _Decompressed) else stream.tell()


def discard(stream: io.BufferedReader, count: int) -> None:
    """Pass over ``count`` bytes.

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
    """The decompressed bytes of all parts of a file. Memory and work per call are bounded by what is asked for."""

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

    def readable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """That of the file beneath."""
        return self._raw.fileno()

    @property
    def consumed(self) -> int:
        """Bytes of the file that have been decompressed."""
        return self._raw.tell() - len(self._input)

    def readinto(self, target: Any) -> int:
        """Fill ``target``, which is left short at the end of the file only.

        Raises:
            CorruptStreamError: damaged data, or the file ends within a part; what comes before is given out first.
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

    def close(self) -> None:
        """Close the file beneath as well."""
        super().close()
        self._raw.close()

    def _next(self, most: int) -> bytes | None:
        """Up to ``most`` bytes, perhaps none; None at the end of the file."""
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
    """zlib's decompressor with the interface of the others."""

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
    """How to decompress one part, what that raises, and the padding that may lie between two parts."""
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
