"""Encode groups as bytes: one byte for the format, then compact JSON compressed with zlib. Lossless.

Most of a group is log-probabilities. They are stored in binary, in four bytes each if that is lossless (as with an
engine that computes them in fp32). This takes less than half the time of decimals and 0.6 of the bytes. Expert numbers
are stored as they are, and a prefix's once for all candidates that share it. The checksum of zlib detects damage.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.types import Candidate, Cost, Episode, Failed, Group, Reward, Routing, Source

FORMAT = 1
"""Incremented when older versions cannot read the bytes."""
ROUTED_FORMAT = 2
"""Of groups whose candidates have expert numbers, which versions before them cannot read."""

_LARGEST = 256 * 2**20
"""Bytes of a decompressed record; a larger one counts as damaged."""
_LEVEL = 1
"""Level of zlib; token ids and log-probabilities hardly compress better at higher ones."""


class DamagedRecordError(BufferUnavailableError):
    """A record that cannot be read back."""


def encode_group(group: Group) -> bytes:
    """Encode ``group`` as bytes.

    Raises:
        ValueError: a ``detail`` is not JSON-serializable.
    """
    episode, cost = group.episode, group.cost
    prefixes = list(dict.fromkeys(c.routing.prefix for c in group.candidates if c.routing))
    plain = [
        [episode.id, episode.prefix, episode.suffix, episode.corpus, episode.document, episode.offset]
        + [episode.label] * bool(episode.label),
        [
            # Only blank and routed candidates have more fields, so that older versions can read all others.
            [c.source.value, c.tokens, c.policy_version, c.seed, c.finish_reason, _pack_floats(c.logprobs)]
            + ([c.blank, _plain_routing(c.routing, prefixes)] if c.routing else [True] * c.blank)
            for c in group.candidates
        ],
        [
            [reward.value, reward.judge, reward.prompt_version, reward.detail]
            if isinstance(reward, Reward)
            else [reward.reason, reward.detail]
            for reward in group.rewards
        ],
        group.rewrite_failure and [group.rewrite_failure.reason, group.rewrite_failure.detail],
        # Without the last number where it is unknown, so that older versions can read the group.
        cost
        and [cost.calls, cost.prompt_tokens, cost.answer_tokens, cost.seconds]
        + ([] if cost.cached_tokens is None else [cost.cached_tokens]),
        *([[_text(prefix) for prefix in prefixes]] if prefixes else []),
    ]
    try:
        return _pack(plain, ROUTED_FORMAT if prefixes else FORMAT)
    except TypeError as error:
        raise ValueError(f"episode {episode.id} has a detail that JSON cannot hold: {error}") from None


def decode_group(data: bytes, where: str = "a group") -> Group:
    """Decode what ``encode_group`` wrote; ``where`` names it in errors.

    Raises:
        DamagedRecordError: the bytes are damaged.
        BufferUnavailableError: they have another format.
    """
    plain = _unpack(data, where)
    try:
        episode, candidates, rewards, rewrite_failure, cost, *prefixes = plain
        shared = [_bytes(text) for texts in prefixes for text in texts]
        identity, prefix, suffix, *where_from = episode
        return Group(
            Episode(identity, tuple(prefix), tuple(suffix), *where_from),
            tuple(_candidate(shared, *candidate) for candidate in candidates),
            tuple(Reward(*reward) if len(reward) == 4 else Failed(*reward) for reward in rewards),
            rewrite_failure and Failed(*rewrite_failure),
            cost and Cost(*cost),
        )
    except (TypeError, ValueError, LookupError, ArithmeticError, struct.error) as error:
        raise _damaged(where, error) from None


def encode_text(text: str) -> bytes:
    """Encode a reply as bytes."""
    return _pack(text)


def decode_text(data: bytes, where: str = "a reply") -> str:
    """Decode what ``encode_text`` wrote.

    Raises:
        BufferUnavailableError: the bytes are damaged or have another format.
    """
    return str(_unpack(data, where))


def _plain_routing(routing: Routing, prefixes: Sequence[bytes]) -> list[Any]:
    number = prefixes.index(routing.prefix)
    return [number, _text(routing.completion), routing.layers, routing.per_token, routing.width]


def _candidate(
    prefixes: Sequence[bytes],
    source: str,
    tokens: list[int],
    policy_version: int | None,
    seed: int | None,
    finish_reason: str | None,
    logprobs: str | None,
    blank: bool = False,
    routing: list[Any] | None = None,
) -> Candidate:
    record = None
    if routing is not None:
        number, completion, layers, per_token, width = routing
        record = Routing(prefixes[number], _bytes(completion), layers, per_token, width)
    values = _unpack_floats(logprobs)
    return Candidate(Source(source), tuple(tokens), policy_version, seed, finish_reason, values, bool(blank), record)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _pack_floats(values: Sequence[float] | None) -> str | None:
    """Return ``f`` or ``d`` (4 or 8 bytes each, little-endian, as in ``struct``) and the base64 of the values."""
    if values is None:
        return None
    for kind in "fd":
        layout = f"<{len(values)}{kind}"
        try:
            data = struct.pack(layout, *values)
        except OverflowError:  # larger than any fp32
            continue
        if kind == "d" or struct.unpack(layout, data) == tuple(values):
            return kind + _text(data)
    raise AssertionError("every float fits 8 bytes")


def _unpack_floats(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    kind, data = text[0], _bytes(text[1:])
    return struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data)


def _pack(plain: Any, form: int = FORMAT) -> bytes:
    # Escape to ASCII: texts may hold lone surrogates, which UTF-8 cannot encode.
    text = json.dumps(plain, separators=(",", ":"), ensure_ascii=True)
    return bytes([form]) + zlib.compress(text.encode("ascii"), _LEVEL)


def _unpack(data: bytes, where: str) -> Any:
    if not data or data[0] not in (FORMAT, ROUTED_FORMAT):
        found = f"format {data[0]}" if data else "nothing"
        raise BufferUnavailableError(
            f"{where} in the rollout buffer has {found}, this version reads formats {FORMAT} and {ROUTED_FORMAT}; use "
            "the version of megatron_rlpt that wrote it, or another buffer.name"
        )
    try:
        expanding = zlib.decompressobj()
        text = expanding.decompress(data[1:], _LARGEST)
        if not expanding.eof or expanding.unused_data:
            raise ValueError("wrong length")
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise _damaged(where, error) from None


def _damaged(where: str, error: Exception) -> DamagedRecordError:
    return DamagedRecordError(
        f"{where} in the rollout buffer is damaged ({error}); check the store's disk, then use another buffer.name: "
        "the trainer puts all groups since its checkpoint again"
    )
