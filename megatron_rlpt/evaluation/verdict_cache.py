"""Verdicts by content: an evaluation that was killed goes on, and a repeated one asks nothing.

    <folder>/<judge>/<rank>.jsonl       one line per judged group: {"key": "...", "rewards": [...]}

The folder of a judge is named by the digest of all that its verdicts depend on; the key of a line digests prefix,
reference and candidates of the group and the seed. Failures of the judge are not stored, so they are asked again. Every
rank writes its own file and reads all.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import not_written
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.teacher.judge import NOT_JUDGED
from megatron_rlpt.types import Failed, Group, Reward

_log = get_logger(__name__)

_HEAD = '{"key": "'
_HEX = 32


class VerdictCache:
    """The stored verdicts of one judge."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        """
        Args:
            folder: of all verdicts.
            identity: what the verdicts depend on besides group and seed; JSON-serializable.
            rank: of this process among those that share the folder.
        """
        text = json.dumps(identity, sort_keys=True)
        self._folder = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._own = self._folder / f"{rank}.jsonl"
        self._identity = text
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._places)

    def find(self, group: Group, seed: int) -> Group | None:
        """Return ``group`` as it was judged before, or None."""
        place = self._places.get(_key(group, seed))
        if place is None:
            return None
        path, offset = place
        try:
            with path.open("rb") as file:
                file.seek(offset)
                found = json.loads(file.readline())["rewards"]
            rewards = tuple(Reward(*one) if len(one) == 4 else Failed(*one) for one in found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("a stored verdict cannot be read; asking again", file=path, reason=error)
            return None
        return replace(group, rewards=rewards) if len(rewards) == len(group.candidates) else None

    def store(self, group: Group, seed: int) -> None:
        """Store a judged group, unless the judge failed on a candidate.

        Raises:
            ConfigError, CheckpointError: the file cannot be written.
        """
        if any(isinstance(one, Failed) and one.reason not in NOT_JUDGED for one in group.rewards):
            return
        rewards = [
            [one.value, one.judge, one.prompt_version, one.detail]
            if isinstance(one, Reward)
            else [one.reason, one.detail]
            for one in group.rewards
        ]
        key = _key(group, seed)
        line = f'{_HEAD}{key}", "rewards": {json.dumps(rewards)}}}\n'.encode("ascii")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            identity = self._folder / "judge.json"
            if not identity.is_file():
                identity.write_text(self._identity + "\n", encoding="utf-8")
            with self._own.open("ab") as file:
                offset = file.tell()
                if offset and not _ends_with_line(self._own):  # a process was killed while it wrote
                    file.write(b"\n")
                    offset += 1
                file.write(line)
        except OSError as error:
            raise not_written(self._own, error) from error
        self._places[key] = (self._own, offset)

    def _index(self, path: Path) -> None:
        head, offset = _HEAD.encode(), 0
        with path.open("rb") as file:
            for line in file:
                if line.startswith(head) and line.endswith(b"]}\n"):
                    self._places[line[len(head) : len(head) + _HEX].decode("ascii", "replace")] = (path, offset)
                offset += len(line)


def _key(group: Group, seed: int) -> str:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=_HEX // 2)
    parts: Sequence[Sequence[int]] = (
        group.episode.prefix,
        group.episode.suffix,
        *(one.tokens for one in group.candidates),
    )
    for tokens in parts:
        digest.update(struct.pack(f"<q{len(tokens)}q", len(tokens), *tokens))
    digest.update(bytes(one.blank for one in group.candidates))
    return digest.hexdigest()


def _ends_with_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
