"""Parse JSON records, and split a stream of JSON values into records."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_rlpt.data.readers.compression import CHUNK, CorruptStreamError, discard
from megatron_rlpt.data.readers.documents import EXCERPT_CHARACTERS, MissingFieldError, pick

_BEFORE_ARRAY = re.compile(rb"[^\[]*+")
_BETWEEN = re.compile(rb"[\s,]*+")
_BLANK = re.compile(rb"\s*+")
_BORDER = re.compile(rb'"|[\[{]++|[\]}]++|,')
_INSIDE_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)

_MOST_DIGITS = 4000
"""Maximum digits of an integer that Python converts by default and in reasonable time."""


class NotARecordError(Exception):
    """The record is not a JSON object."""


class FieldParser:
    """Extracts the text field from a JSON record; ``field`` None is the whole record."""

    def __init__(self, field: str | None) -> None:
        self._field = field
        self._keys = [json.dumps(key).encode() for key in {field, *field.split(".")}] if field is not None else []

    def parse(self, raw: bytes) -> object:
        """Return the value of the field.

        Raises:
            NotARecordError: not UTF-8, not JSON, or not an object.
            MissingFieldError: the object has no such field, or has it twice.
        """
        try:
            record = _load(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise NotARecordError(f"not UTF-8 at byte {error.start} of the record") from None
        except RecursionError:
            raise NotARecordError("not JSON that can be read: nested too deeply") from None
        except ValueError as error:
            raise NotARecordError(f"not JSON: {error}") from None
        if not isinstance(record, dict):
            raise NotARecordError(f"not a JSON object but {type(record).__name__}")
        if self._field is None:
            return record
        # Quotes within strings are escaped, so a second match is almost always a second key.
        if any(raw.count(key) > 1 for key in self._keys):
            self._require_once(raw)
        return pick(record, self._field)

    def _require_once(self, raw: bytes) -> None:
        """Raise if the field occurs twice: the JSON standard does not define which one is valid."""
        assert self._field is not None
        node: Any = _load(raw.decode("utf-8"), _Pairs)
        for part in [self._field] if self._field in node else self._field.split("."):
            if not isinstance(node, dict) or part not in node:
                return
            if isinstance(node, _Pairs) and part in node.repeated:
                raise MissingFieldError(f"field {self._field!r} occurs twice")
            node = node[part]


class _Pairs(dict[str, Any]):
    """A JSON object with the set of its repeated keys."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}


def _load(text: str, pairs: type[_Pairs] | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # An integer of thousands of digits, possibly in an unused field.
        return json.loads(text, object_pairs_hook=pairs, parse_int=_number)


def _number(digits: str) -> float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


@dataclass(frozen=True)
class TooLarge:
    """Size in bytes and first bytes of a record above the limit."""

    size: int
    beginning: bytes


class ValueScanner:
    """Splits a JSON array, or a sequence of JSON objects, into values; holds one value at a time.

    Args:
        stream: bytes of the file from ``start`` on.
        limit: maximum bytes of a value to hold.
        array: whether the file is an array; otherwise a sequence of values.
        start: offset of the stream in the file: 0, or the end of a value.
    """

    def __init__(self, stream: io.BufferedReader, limit: int, array: bool, start: int) -> None:
        self._stream = stream
        self._limit = limit
        self._array = array
        self._buffer = b""
        self._at = 0
        self._before = start
        """Bytes of the file before the buffer."""
        if array and start == 0:
            self._find(_BEFORE_ARRAY)
            self._at += 1

    @property
    def byte(self) -> int:
        """Offset in the file at which the search for the next value starts."""
        return self._before + self._at

    def move(self, byte: int) -> None:
        """Move forward to the end of an earlier value.

        Raises:
            EOFError, CorruptStreamError: the file is shorter or damaged.
        """
        ahead = byte - self._before
        if ahead > len(self._buffer):
            discard(self._stream, ahead - len(self._buffer))
            self._before, self._buffer, ahead = byte, b"", 0
        self._at = ahead

    def next(self) -> bytes | TooLarge | None:
        """Return the next value; None at the end of the file.

        Raises:
            CorruptStreamError: the file ends within a value or an array, or has data after the array.
        """
        if not self._find(_BETWEEN):
            if self._array:
                raise CorruptStreamError("the file ends within its JSON array", cut=True)
            return None
        if self._array and self._buffer[self._at] == ord("]"):
            self._at += 1
            if self._find(_BLANK):
                raise CorruptStreamError("the file has data after its JSON array", unread=len(self._buffer) - self._at)
            return None
        return self._value()

    def _value(self) -> bytes | TooLarge:
        """Return the value that starts at ``_at``."""
        parts: list[bytes] = []
        size, depth, inside, escaped, at = 0, 0, False, False, self._at
        while True:
            buffer, end = self._buffer, None
            if escaped and at < len(buffer):
                at, escaped = at + 1, False
            while at < len(buffer):
                if inside:
                    match = _INSIDE_STRING.match(buffer, at)
                    assert match is not None
                    at = match.end()
                    if at == len(buffer):
                        break
                    inside, escaped = buffer[at] != ord('"'), buffer[at] == ord("\\")
                    at += 1
                    continue
                border = _BORDER.search(buffer, at)
                if border is None:
                    at = len(buffer)
                    break
                at, kind, run = border.end(), border[0][0], len(border[0])
                if kind == ord('"'):
                    inside = True
                elif kind in b"[{":
                    depth += run
                elif kind == ord(",") or depth == 0:
                    if depth == 0:
                        # A number or string outside of an object; an unmatched closing brace is part of it, so
                        # that the scan advances.
                        stray = kind == ord("}") or not self._array
                        end = border.start() + (1 if stray else 0)
                        break
                elif run >= depth:
                    end = border.start() + depth
                    break
                else:
                    depth -= run
            stop = len(buffer) if end is None else end
            size += stop - self._at
            if size <= self._limit or not parts:
                parts.append(buffer[self._at : min(stop, self._at + self._limit)])
            self._at = at = stop
            if end is not None:
                break
            if not self._fill():
                if self._array or depth or inside:
                    raise CorruptStreamError("the file ends within a JSON value", cut=True)
                break
            at = self._at
        if size > self._limit:
            return TooLarge(size, parts[0][:EXCERPT_CHARACTERS])
        return b"".join(parts)

    def _find(self, passed: re.Pattern[bytes]) -> bool:
        """Skip everything that matches ``passed``; return False at the end of the file."""
        while True:
            match = passed.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer):
                return True
            if not self._fill():
                return False

    def _fill(self) -> bool:
        """Replace the consumed buffer with the next chunk; return False at the end of the file."""
        self._before += len(self._buffer)
        self._at = 0
        self._buffer = self._stream.read(CHUNK)
        return bool(self._buffer)
