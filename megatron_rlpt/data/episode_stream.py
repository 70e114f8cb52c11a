"""The episodes a rank trains on: documents drawn, cut, shuffled in a bounded buffer, resumable at any episode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rlpt.config.schema import DataConfig
from megatron_rlpt.data.documents import Document, Position
from megatron_rlpt.data.episodes import Cutter, Encode
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.data.stream import Counters, DocumentStream
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.records import Episode, derive_seed, stable_id

_CUT_SETTINGS = (
    "suffix_length",
    "max_prefix",
    "min_prefix",
    "episodes_per_document",
    "shuffle_buffer",
    "add_bos",
)
"""Fields of ``data`` that the next episode depends on."""


class _Held(NamedTuple):
    """An episode in the shuffle buffer, and where to cut it again."""

    episode: Episode
    source: int
    position: Position


class _Open(NamedTuple):
    """The document being cut, and the offsets of the episodes still to come from it (at least one)."""

    document: Document
    tokens: list[int]
    offsets: deque[int]
    source: int
    position: Position


class EpisodeStream:
    """Episodes without end, in an order that depends on configuration, corpus, tokenizer, seed and rank only.

    The shuffle buffer holds up to ``data.shuffle_buffer`` episodes, is filled before an episode is served, and never
    holds the same episode twice: when a small corpus starts again before an episode of the last pass was served, the
    buffer waits for it. So a corpus smaller than the buffer is read ahead by one pass at most, not by hundreds.

    Args:
        config: Sources and how to cut them.
        encode: Text to token ids, without special tokens.
        seed: Seed of the run.
        rank: Data-parallel rank, from 0.
        world_size: Number of data-parallel ranks; together they serve every document of a pass once.
        quarantine: File for malformed records, appended to; None only counts them.
        bos_id: The tokenizer's BOS token, for ``data.add_bos``.
        starts_character: Whether a token starts a character; None where all tokens do.

    Raises:
        DataError: a source is missing, empty or not recognised.
        ConfigError: ``data.add_bos`` without a BOS token.
    """

    def __init__(
        self,
        config: DataConfig,
        encode: Encode,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        quarantine: Path | None = None,
        bos_id: int | None = None,
        starts_character: Callable[[int], bool] | None = None,
    ) -> None:
        self._cutter = Cutter(config, encode, bos_id, starts_character)
        self._documents = DocumentStream(
            config.sources, seed, Quarantine(quarantine, config.max_bad_fraction), rank, world_size
        )
        self._capacity = config.shuffle_buffer
        self._settings = {name: getattr(config, name) for name in _CUT_SETTINGS} | {
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "bos_id": bos_id,
        }
        self._shuffle_seed = derive_seed(seed, "shuffle", rank)
        self._buffer: list[_Held] = []
        self._buffered_ids: set[str] = set()
        self._open: _Open | None = None

    @property
    def counters(self) -> Counters:
        """What this rank has read and served so far."""
        return self._documents.counters

    def take(self, count: int) -> list[Episode]:
        """The next ``count`` episodes; ``take(2)`` after ``take(3)`` gives what ``take(5)`` would have given.

        Raises:
            DataError: too many malformed records, or no usable document in one full pass.
        """
        return [self._serve() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on at the next episode, JSON-serialisable.

        Buffered episodes are stored as places in the corpus (some 60 bytes each, not their tokens) and are cut again
        on load.
        """
        pending = self._open
        return {
            "settings": self._settings,
            "counters": asdict(self.counters) | {"epochs": list(self.counters.epochs)},
            "documents": self._documents.state_dict(),
            "buffer": [[held.source, held.position, held.episode.offset] for held in self._buffer],
            "open": pending and [pending.source, pending.position, len(pending.offsets)],
            "check": self._check(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. The buffer's documents are read and tokenized again.

        Raises:
            CheckpointError: sources, files, seed, rank, world size, cutting or tokenizer differ from those of the
                run that wrote the state.
        """
        for name, before in state["settings"].items():
            now = self._settings[name]
            if now != before:
                raise CheckpointError(
                    f"the data stream was saved with {name} = {before}, this run has {now}; restore {name} or start a "
                    "new run"
                )
        self._documents.check_layout(state["documents"])
        self._rebuild(state)
        self._documents.load_state_dict(state["documents"])
        for name, value in state["counters"].items():
            setattr(self.counters, name, tuple(value) if name == "epochs" else value)
        if self._check() != state["check"]:
            raise CheckpointError(
                "the shuffle buffer differs from the saved one: the text or the tokenizer has changed; restore them or "
                "start a new run"
            )

    def _serve(self) -> Episode:
        self._fill()
        counters = self.counters
        index = derive_seed(self._shuffle_seed, counters.episodes_served) % len(self._buffer)
        counters.episodes_served += 1
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        held = self._buffer.pop()
        self._buffered_ids.remove(held.episode.id)
        return held.episode

    def _fill(self) -> None:
        while len(self._buffer) < self._capacity:
            while self._open is None:
                self._open = self._open_next()
            held = self._cut(self._open, self._open.offsets[0])
            if held.episode.id in self._buffered_ids:
                return
            self._hold(held)
            self._open.offsets.popleft()
            if not self._open.offsets:
                self._open = None

    def _hold(self, held: _Held) -> None:
        self._buffer.append(held)
        self._buffered_ids.add(held.episode.id)

    def _cut(self, open_: _Open, offset: int) -> _Held:
        corpus = self._documents.sources[open_.source].path
        episode = self._cutter.cut(corpus, open_.document.id, open_.tokens, offset)
        return _Held(episode, open_.source, open_.position)

    def _open_next(self) -> _Open | None:
        """The next usable document; None if the next record is malformed or too short."""
        drawn = self._documents.draw()
        if drawn is None:
            return None
        tokens = self._tokenize(drawn.document, drawn.source)
        offsets = self._cutter.offsets(tokens)
        if not offsets:
            self.counters.too_short += 1
            return None
        self.counters.usable += 1
        return _Open(drawn.document, tokens, deque(offsets), drawn.source, drawn.position)

    def _tokenize(self, document: Document, source: int) -> list[int]:
        return self._cutter.tokenize(document.text, self._documents.sources[source].control_tokens)

    def _rebuild(self, state: dict[str, Any]) -> None:
        """Read the documents behind the buffer again, in corpus order so that readers mostly move forward."""
        places = [(source, position) for source, position, _ in state["buffer"]]
        if state["open"]:
            places.append((state["open"][0], state["open"][1]))
        wanted: dict[tuple[int, str], list[int]] = {}
        for slot, (source, position) in enumerate(places):
            wanted.setdefault((source, str(position)), []).append(slot)
        rebuilt: list[_Held | None] = [None] * len(state["buffer"])
        self._open = None
        for slots in sorted(wanted.values(), key=lambda slots: _reading_order(*places[slots[0]])):
            source, position = places[slots[0]]
            document = self._documents.reread(source, position)
            tokens = self._tokenize(document, source)
            offsets = self._cutter.offsets(tokens)
            for slot in slots:
                place = _Open(document, tokens, deque(offsets), source, position)
                if slot < len(rebuilt):
                    rebuilt[slot] = self._cut(place, state["buffer"][slot][2])
                    continue
                while len(place.offsets) > state["open"][2]:
                    place.offsets.popleft()
                self._open = place if place.offsets else None
        self._buffer, self._buffered_ids = [], set()
        for held in rebuilt:
            assert held is not None
            self._hold(held)

    def _check(self) -> str:
        """Digest of the episodes in the buffer and of the next one, to compare after they were cut again."""
        upcoming = self._open and self._cut(self._open, self._open.offsets[0]).episode.id
        return stable_id(*(held.episode.id for held in self._buffer), upcoming)


def _reading_order(source: int, position: Position) -> tuple[int, ...]:
    return (source, *(part for part in position if isinstance(part, int)))
