"""Stream the training episodes of a rank: draw, cut, mix by share, shuffle, and resume at any episode."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlpt.config import DataConfig, HeldOutOverlap, MixBy
from megatron_rlpt.data.episodes import Cutter, Encode
from megatron_rlpt.data.lane import Held, Key, Lane, OpenDocument
from megatron_rlpt.data.overlap import HeldOut, Location, overlap_error
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.data.readers.documents import Document, Position, shown
from megatron_rlpt.data.stream import DocumentStream, Drawn, StreamCounters
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.tokens.tokenizer import Vocabulary
from megatron_rlpt.types import SEED_RANGE, Episode, derive_seed, stable_id

_log = logging.getLogger(__name__)

_CUT_SETTINGS = (
    "suffix_length",
    "max_prefix",
    "min_prefix",
    "episodes_per_document",
    "shuffle_buffer",
    "mix_by",
    "add_bos",
)
"""Fields of ``data`` that the next episode depends on."""

_MANY_MISSED = 10_000
"""Consecutive records without a usable document after which a warning explains the delay."""

_CHANGED = (
    "the shuffle buffer differs from the saved one: the text or the tokenizer has changed; restore them or start a new "
    "run"
)


_Slot = tuple[int, str]
"""Source and position of a document, as a dictionary key."""


class EpisodeStream:
    """Endless episodes in an order that depends only on configuration, corpus, tokenizer, seed and rank.

    All suffixes have the same number of tokens, except a few that are shortened to avoid cutting a character. With
    ``data.mix_by: tokens`` each source has a separate lane (a part of the shuffle buffer, see ``Lane``). The next
    episode comes from the source furthest behind its share, plus a random fraction of an episode: after any number of
    episodes, each source is within two episodes of its share, whatever the length of its documents. With
    ``mix_by: documents`` all sources share one lane, and sources with longer documents give more episodes.

    Args:
        config: Sources and how to cut them.
        encode: Text to token ids, without special tokens.
        seed: Seed of the run.
        rank: Data-parallel rank, from 0.
        world_size: Number of data-parallel ranks; together they serve every document once per pass.
        quarantine: File to append malformed records to; None only counts them.
        bos_id: The tokenizer's BOS token, for ``data.add_bos``.
        starts_character: Returns whether a token starts a character; None if all tokens do.
        vocabulary: Vocabulary of the tokenizer, for sources that hold tokens.
        held_out: Documents to keep out of training; ``data.heldout_overlap`` sets whether to skip or refuse them.
        remembered: Number of recently served episodes to record in the state: they may not have been trained on yet.

    Raises:
        DataError: a source is missing, empty or not recognized.
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
        vocabulary: Vocabulary | None = None,
        held_out: HeldOut | None = None,
        remembered: int = 0,
    ) -> None:
        self.held_out_digest = held_out.digest if held_out else ""
        """Digest of the documents to keep out of training."""
        self._held_out = held_out
        self._recent: deque[tuple[str, int, Position]] = deque(maxlen=remembered)
        """Id, source and position of the last episodes served."""
        self._skip = config.heldout_overlap is HeldOutOverlap.skip
        self._cutter = Cutter(config, encode, bos_id, starts_character)
        self._documents = DocumentStream(
            config.sources,
            seed,
            Quarantine(quarantine, config.max_bad_fraction),
            rank,
            world_size,
            config.max_record_bytes,
            vocabulary,
        )
        self._settings = {name: getattr(config, name) for name in _CUT_SETTINGS} | {
            "mix_by": config.mix_by.value,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "bos_id": bos_id,
        }
        self._mix_seed = derive_seed(seed, "share", rank)
        self._shares = _shares(config)
        by_source = config.mix_by is MixBy.tokens
        self._lanes = [
            Lane(
                max(1, round(config.shuffle_buffer * share)),
                derive_seed(seed, "shuffle", rank, number),
                partial(self._open_next, number if by_source else None),
                self._cut,
            )
            for number, share in enumerate(self._shares)
        ]

    @property
    def counters(self) -> StreamCounters:
        """Return the counters of this rank."""
        return self._documents.counters

    def metrics(self) -> dict[str, float]:
        """Return documents read, lost and repeated and episodes served by this rank, as metrics."""
        return self._documents.metrics()

    def take(self, count: int) -> list[Episode]:
        """Return the next ``count`` episodes; ``take(3)`` and ``take(2)`` together equal ``take(5)``.

        Raises:
            DataError: too many malformed records, or no usable document in one full pass.
        """
        return [self._serve() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serializable state to resume from at the next episode.

        Buffered episodes are stored as locations in the corpus (about 60 bytes each, without their tokens) and are cut
        again on load.
        """
        return {
            "settings": self._settings,
            "counters": {name: list(value) if isinstance(value, tuple) else value
                         for name, value in asdict(self.counters).items()},
            "documents": self._documents.state_dict(),
            "lanes": [
                {
                    "served": lane.served,
                    "buffer": [[held.source, held.position, held.episode.offset] for held in lane.buffer],
                    "open": [_location(document) for document in lane.open],
                    "waiting": lane.waiting and _location(lane.waiting),
                }
                for lane in self._lanes
            ],
            "check": self._check(),
            "held_out": self.held_out_digest,
            "recent": [list(entry) for entry in self._recent],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> frozenset[str] | None:
        """Resume from ``state``: read and tokenize the documents of the buffer again.

        If the held-out documents have changed, remove those that are now held out from the buffer.

        Returns:
            None if the held-out documents have not changed, else the ids of the remembered episodes that are now held
            out.

        Raises:
            DataError: the buffer has a document that is now held out, and ``data.heldout_overlap`` is not ``skip``.
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
        changed = (state.get("held_out") or "") != self.held_out_digest
        recent = [(identity, source, position) for identity, source, position in state.get("recent", [])]
        held_out = self._rebuild(state["lanes"], recent if changed else [], changed)
        self._recent.extend(recent)
        self._documents.load_state_dict(state["documents"])
        for name, value in state["counters"].items():
            setattr(self.counters, name, tuple(value) if isinstance(value, list) else value)
        if self._check() != state["check"]:
            raise CheckpointError(_CHANGED)
        if not changed:
            return None
        dropped = sum(lane.drop(held_out.values()) for lane in self._lanes)
        self.counters.held_out += len(held_out)
        if self._documents.logs:
            _log.warning(
                "held-out documents changed since the checkpoint: skipping them from now on (earlier updates are not "
                "undone); removed from shuffle buffer and pending batches: documents=%d buffer_episodes=%d",
                len(held_out),
                dropped,
            )
        return frozenset(identity for identity, *location in recent if _slot(*location) in held_out)

    def _serve(self) -> Episode:
        lanes = {number: lane for number, lane in enumerate(self._lanes) if lane.fill()}
        held = lanes[self._choose(list(lanes))].serve()
        self.counters.count_served(held.source)
        self._recent.append((held.episode.id, held.source, held.position))
        return held.episode

    def _choose(self, lanes: list[int]) -> int:
        """Return the lane furthest behind its share; a random fraction keeps equal shares from strictly alternating."""
        share = sum(self._shares[number] for number in lanes)
        served = sum(self._lanes[number].served for number in lanes)

        def behind(number: int) -> float:
            due = (served + 1) * self._shares[number] / share
            return due - self._lanes[number].served + derive_seed(self._mix_seed, number, served) / SEED_RANGE

        return max(lanes, key=behind)

    def _cut(self, document: OpenDocument, offset: int) -> Episode:
        corpus = self._documents.sources[document.source].path
        return self._cutter.cut(corpus, document.id, document.tokens, offset, document.label)

    def _open_next(self, source: int | None) -> OpenDocument | None:
        """Return the next usable document of ``source`` (None: of any source), or None if there are no more."""
        missed = 0
        while source is None or not self._documents.is_barren(source):
            missed += 1
            if missed == _MANY_MISSED:
                which = "data.sources" if source is None else f"data.sources[{source}]"
                _log.warning("%s: no usable document in %d consecutive records; still reading", which, missed - 1)
            drawn = self._documents.draw(source)
            if drawn is None:
                continue
            document = self._open(drawn.document, drawn.source, drawn.position)
            if document.offsets and self._is_held_out(drawn):
                continue
            if document.offsets:
                self._documents.note_usable(drawn.source)
                return document
            self._count_unused(document)
        return None

    def _count_unused(self, document: OpenDocument) -> None:
        """Count a document without episodes under its reason."""
        if document.prompt:
            self._count_too_long(document)
            return
        if not self._cutter.is_long_enough(document.tokens):
            self.counters.too_short += 1
            return
        if not self.counters.not_cut and self._documents.logs:
            path = shown(self._documents.sources[document.source].path)
            _log.warning("%r (document %s) skipped: its characters have too many tokens to cut; such documents are "
                         "counted in data/not_cut", path, shown(document.id))  # fmt: skip
        self.counters.not_cut += 1

    def _count_too_long(self, document: OpenDocument) -> None:
        if not self.counters.too_long and self._documents.logs:
            _log.warning(
                "%r (prompt %s) skipped: it has %d tokens and its answer %d, more than data.max_prefix or "
                "data.suffix_length; such prompts are counted in data/too_long",
                shown(self._documents.sources[document.source].path),
                shown(document.id),
                document.prompt,
                len(document.tokens) - document.prompt,
            )
        self.counters.too_long += 1

    def _is_held_out(self, drawn: Drawn) -> bool:
        """Return whether a document is held out; count it, and warn the first time.

        Raises:
            DataError: the document is held out and ``data.heldout_overlap`` is not ``skip``.
        """
        if (held := self._find_held_out(drawn)) is None:
            return False
        if not self.counters.held_out and self._documents.logs:
            location = self._location_of(drawn)
            _log.warning("%s is also held out (%s); skipping such documents in training", location, held)
        self.counters.held_out += 1
        return True

    def _find_held_out(self, drawn: Drawn) -> Location | None:
        """Return the location of the held-out copy of a document, or None.

        Raises:
            DataError: there is one and ``data.heldout_overlap`` is not ``skip``.
        """
        if self._held_out is None or (held := self._held_out.find_document(drawn.document)) is None:
            return None
        if not self._skip:
            raise overlap_error(self._location_of(drawn), held)
        return held

    def _location_of(self, drawn: Drawn) -> Location:
        path = self._documents.sources[drawn.source].path
        return Location(f"data.sources[{drawn.source}]", path, drawn.document.id)

    def _open(self, document: Document, source: int, position: Position) -> OpenDocument:
        control = self._documents.sources[source].control_tokens
        tokens = array("i", self._cutter.tokenize(document, control))
        offsets = deque(self._cutter.offsets(tokens, document.prompt))
        return OpenDocument(document.id, tokens, offsets, source, position, document.prompt, document.label)

    def _rebuild(
        self, lanes: list[dict[str, Any]], recent: list[tuple[str, int, Position]], look: bool
    ) -> dict[_Slot, Key]:
        """Restore the lanes: read their documents again, in corpus order so that readers mostly move forward.

        Args:
            lanes: saved state of every lane.
            recent: additional documents to read.
            look: whether to look for held-out documents.

        Returns:
            The held-out documents.
        """
        slots: dict[_Slot, list[tuple[int, str, int, list[Any]]]] = {}
        for _, source, position in recent:
            slots.setdefault(_slot(source, position), []).append((0, "recent", 0, [source, position, 0]))
        for number, saved in enumerate(lanes):
            waiting = [saved["waiting"]] if saved["waiting"] else []
            for part, locations in (("buffer", saved["buffer"]), ("open", saved["open"]), ("waiting", waiting)):
                for index, location in enumerate(locations):
                    slots.setdefault(_slot(*location[:2]), []).append((number, part, index, location))
        held_out: dict[_Slot, Key] = {}
        held: dict[tuple[int, int], Held] = {}
        opened: dict[tuple[int, str, int], OpenDocument] = {}
        for slot, same in sorted(slots.items(), key=lambda item: _reading_order(*item[1][0][3][:2])):
            source, position, _ = same[0][3]
            drawn = Drawn(self._documents.reread(source, position), source, position)
            if look and self._find_held_out(drawn):
                held_out[slot] = (source, drawn.document.id)
            document = self._open(drawn.document, source, position)
            for number, part, index, (*_, value) in same:
                if part == "buffer":
                    held[number, index] = Held(self._cut(document, value), source, position)
                elif part != "recent":
                    rest = deque(list(document.offsets)[max(0, len(document.offsets) - value) :])
                    opened[number, part, index] = replace(document, offsets=rest)
        if not all(document.offsets for document in opened.values()):
            raise CheckpointError(_CHANGED)
        for number, (lane, state) in enumerate(zip(self._lanes, lanes, strict=True)):
            lane.restore(
                state["served"],
                [held[number, index] for index in range(len(state["buffer"]))],
                [opened[number, "open", index] for index in range(len(state["open"]))],
                opened.get((number, "waiting", 0)),
            )
        return held_out

    def _check(self) -> str:
        """Return a digest of the buffered and the next episodes, to verify them after a resume."""
        return stable_id(*(episode for lane in self._lanes for episode in lane.upcoming()))


def _shares(config: DataConfig) -> list[float]:
    """Return the share of episodes of every lane."""
    if config.mix_by is MixBy.documents:
        return [1.0]
    total = sum(source.weight for source in config.sources)
    return [source.weight / total for source in config.sources]


def _slot(source: int, position: Position) -> _Slot:
    return source, str(position)


def _location(document: OpenDocument) -> list[Any]:
    return [document.source, document.position, len(document.offsets)]


def _reading_order(source: int, position: Position) -> tuple[int, ...]:
    return (source, *(part for part in position if isinstance(part, int)))
