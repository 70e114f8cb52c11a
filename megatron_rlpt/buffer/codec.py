"""Encode groups as bytes: one byte for the format, then compact JSON compressed with zlib. Lossless.

Most of a group is log-probabilities. They are stored in binary, in four bytes each if that is lossless (as with an
engine that computes them in fp32). This takes less than half the time of decimals and 0.6 of the bytes. The checksum of
zlib detects damage.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.types import Candidate, Cost, Episode, Failed, Group, Reward, Source

FORMAT = 1
"""Incremented when older versions cannot read the bytes."""

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
    plain = [
        [episode.id, episode.prefix, episode.suffix, episode.corpus, episode.document, episode.offset],
        [
            # Only blank candidates have the last field, so that older versions can read all others.
            [c.source.value, c.tokens, c.policy_version, c.seed, c.finish_reason, _pack_floats(c.logprobs)]
            + [True] * c.blank
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
    ]
    try:
        return _pack(plain)
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
        episode, candidates, rewards, rewrite_failure, cost = plain
        identity, prefix, suffix, corpus, document, offset = episode
        return Group(
            Episode(identity, tuple(prefix), tuple(suffix), corpus, document, offset),
            tuple(_candidate(*candidate) for candidate in candidates),
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


def _candidate(
    source: str,
    tokens: list[int],
    policy_version: int | None,
    seed: int | None,
    finish_reason: str | None,
    logprobs: str | None,
    blank: bool = False,
) -> Candidate:
    return Candidate(
        Source(source), tuple(tokens), policy_version, seed, finish_reason, _unpack_floats(logprobs), bool(blank)
    )


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
            return kind + base64.b64encode(data).decode("ascii")
    raise AssertionError("every float fits 8 bytes")


def _unpack_floats(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    kind, data = text[0], base64.b64decode(text[1:], validate=True)
    return struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data)


def _pack(plain: Any) -> bytes:
    # Escape to ASCII: texts may hold lone surrogates, which UTF-8 cannot encode.
    text = json.dumps(plain, separators=(",", ":"), ensure_ascii=True)
    return bytes([FORMAT]) + zlib.compress(text.encode("ascii"), _LEVEL)


def _unpack(data: bytes, where: str) -> Any:
    if data[:1] != bytes([FORMAT]):
        found = f"format {data[0]}" if data else "nothing"
        raise BufferUnavailableError(
            f"{where} in the rollout buffer has {found}, this version reads format {FORMAT}; use the version of "
            "megatron_rlpt that wrote it, or another buffer.name"
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
