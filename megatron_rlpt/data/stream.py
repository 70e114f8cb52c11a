"""Stream documents of several sources: mix by weight, shard over ranks, repeat endlessly, resume at any record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_rlpt.config import SourceConfig
from megatron_rlpt.data.quarantine import MIN_RECORDS, Quarantine
from megatron_rlpt.data.readers.documents import MAX_RECORD_BYTES, BadRecord, Document, Position, Reader, shown
from megatron_rlpt.data.readers.sources import open_source
from megatron_rlpt.errors import CheckpointError, DataError
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.tokens.tokenizer import Vocabulary
from megatron_rlpt.types import SEED_RANGE, derive_seed

_log = get_logger(__name__)


@dataclass
class StreamCounters:
    """Counts of one rank over all passes so far."""

    read: int = 0
    """Documents read, malformed ones included."""
    malformed: int = 0
    """Malformed records."""
    too_short: int = 0
    """Documents shorter than min_prefix + suffix_length."""
    not_cut: int = 0
    """Documents of sufficient length without a cut between two characters."""
    too_long: int = 0
    """Prompts or answers longer than max_prefix or suffix_length."""
    held_out: int = 0
    """Documents skipped because they are held out."""
    usable: int = 0
    """Documents that gave at least one episode."""
    episodes_served: int = 0
    """Episodes served."""
    epochs: tuple[int, ...] = ()
    """Complete passes over each source, in the order of the configuration."""
    served: tuple[int, ...] = ()
    """Episodes served from each source, in the order of the configuration."""

    def count_served(self, source: int) -> None:
        """Count an episode served from ``source``."""
        self.episodes_served += 1
        self.served = tuple(count + (index == source) for index, count in enumerate(self.served))


@dataclass(frozen=True)
class Drawn:
    """A document with its source and position."""

    document: Document
    source: int
    """Index of the source in the configuration."""
    position: Position


@dataclass
class _Cursor:
    """Progress of the stream in one source; the fields are part of the saved state."""

    reader: Reader
    index: int = 0
    """Records of the current pass already passed, over all ranks."""
    epoch: int = 0
    own_read: int = 0
    """Records this rank has read since the first pass without a usable document began."""
    fruitful: bool = False
    """Whether the current pass has given a usable document."""
    barren: bool = False
    """Whether the last pass with enough records for this rank gave no usable document."""


class DocumentStream:
    """Endless stream of documents drawn from the sources.

    A draw reads the next record of the requested source, or of a source picked with a probability proportional to its
    weight; the pick depends only on (seed, rank, number of the draw). In the first pass over a source, rank r of w
    reads the records with index r modulo w, and every further pass shifts the shares by one record: within each pass
    the ranks share all records without overlap, within w passes a rank reads each record once, and no rank starves on a
    source with fewer records than ranks.

    The caller shares ``counters``: it counts documents without episodes there, and reports usable ones to
    ``note_usable``.

    Raises:
        DataError: a source is missing, empty or unreadable.
    """

    def __init__(
        self,
        sources: list[SourceConfig],
        seed: int,
        quarantine: Quarantine,
        rank: int = 0,
        world_size: int = 1,
        max_record_bytes: int = MAX_RECORD_BYTES,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        self.counters = StreamCounters(epochs=(0,) * len(sources), served=(0,) * len(sources))
        self.sources = sources
        self.logs = quarantine.logs
        """Whether this rank logs for all ranks."""
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._quarantine = quarantine
        self._draws = 0
        self._cursors = [_Cursor(open_source(source, max_record_bytes, vocabulary)) for source in sources]
        quarantine.expect([(s.path, cursor.reader.sizes()) for s, cursor in zip(sources, self._cursors, strict=True)])
        # Taken once: a checkpoint describes the corpus at the start of the run, not later changes of its files.
        self._layout = [
            {"path": source.path, **cursor.reader.layout()}
            for source, cursor in zip(sources, self._cursors, strict=True)
        ]

    def draw(self, source: int | None = None) -> Drawn | None:
        """Return the next document of ``source`` (None: pick one by weight), or None if the record is malformed.

        Raises:
            DataError: too many records are malformed, a source has no records, or a full pass over all
                sources gave no usable document.
        """
        if source is None:
            source = self._pick()
        position, record = self._advance(source)
        self._cursors[source].own_read += 1
        self.counters.read += 1
        # Later passes read the same records again.
        if self._cursors[source].epoch == 0:
            self._quarantine.count(record, source)
        if isinstance(record, BadRecord):
            self.counters.malformed += 1
            return None
        return Drawn(record, source, position)

    def note_usable(self, source: int) -> None:
        """Count a document of ``source`` that gave an episode."""
        self.counters.usable += 1
        self._cursors[source].fruitful, self._cursors[source].barren = True, False

    def is_barren(self, source: int) -> bool:
        """Return whether the last full pass over ``source`` gave no usable document."""
        return self._cursors[source].barren

    def reread(self, source: int, position: Position) -> Document:
        """Return the document at the position of a ``Drawn``; this moves the reader, so call ``load_state_dict`` next.

        Raises:
            CheckpointError: there is no readable document at the position.
        """
        reader = self._cursors[source].reader
        reader.seek(position)
        record = reader.read()
        if not isinstance(record, Document):
            raise CheckpointError(
                f"data source {self.sources[source].path!r} has changed since the checkpoint (no document at "
                f"{position}); restore its files or start a new run"
            )
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serializable state to resume from at the next record."""
        return {
            "draws": self._draws,
            "quarantine": self._quarantine.state_dict(),
            "layout": self._layout,
            "cursors": [
                {name: value for name, value in vars(cursor).items() if name != "reader"}
                | {"position": cursor.reader.position}
                for cursor in self._cursors
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``; call ``check_layout`` first."""
        self._draws = state["draws"]
        self._quarantine.load_state_dict(state["quarantine"])
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            fields = dict(saved)
            cursor.reader.seek(fields.pop("position"))
            vars(cursor).update(fields)
        self._note_epochs()

    def check_layout(self, state: dict[str, Any]) -> None:
        """Compare the sources and files of a saved state with those of this stream.

        Raises:
            CheckpointError: a source was added, removed or changed, or its files differ in names or sizes.
        """
        before, now = state["layout"], self._layout
        if len(before) != len(now):
            raise CheckpointError(
                f"the checkpoint was written with {len(before)} data sources, data.sources has {len(now)}; restore "
                "data.sources or start a new run"
            )
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            if old == new:
                continue
            keys = [key for key in new if old.get(key) != new[key] and key != "digest"]
            changes = ", ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in keys)
            raise CheckpointError(
                f"data.sources[{index}] {new['path']!r} has changed since the checkpoint "
                f"({changes or 'file names or sizes differ'}); restore it or start a new run"
            )

    def metrics(self) -> dict[str, float]:
        """Return the counters as metrics; sources are named by their index in the configuration."""
        counters, served = self.counters, self.counters.served
        metrics: dict[str, float] = {
            "data/read": counters.read,
            "data/malformed": counters.malformed,
            "data/too_short": counters.too_short,
            "data/not_cut": counters.not_cut,
            "data/too_long": counters.too_long,
            "data/held_out": counters.held_out,
            "data/lost_bytes": self._quarantine.lost_bytes,
            "data/lost_share": self._quarantine.lost_share,
        }
        for index, (epoch, count) in enumerate(zip(counters.epochs, served, strict=True)):
            metrics[f"data/epochs/{index}"] = epoch
            metrics[f"data/episodes/{index}"] = count
            metrics[f"data/share/{index}"] = count / max(1, sum(served))
        return metrics

    def _pick(self) -> int:
        weights = [source.weight for source in self.sources]
        share = derive_seed(self._seed, "mix", self._rank, self._draws) / SEED_RANGE * sum(weights)
        self._draws += 1
        for index, weight in enumerate(weights):
            share -= weight
            if share < 0:
                return index
        return len(weights) - 1

    def _advance(self, source: int) -> tuple[Position, Document | BadRecord]:
        """Return position and content of the next record of this rank."""
        cursor = self._cursors[source]
        while True:
            own = (cursor.index + cursor.epoch) % self._world_size == self._rank
            position = cursor.reader.position if own else []
            record = cursor.reader.read() if own else None
            if record is None and (own or not cursor.reader.skip()):
                self._end_pass(source)
                continue
            cursor.index += 1
            if record is not None:
                return position, record

    def _end_pass(self, source: int) -> None:
        cursor = self._cursors[source]
        if not cursor.index:
            path = self.sources[source].path
            raise DataError(f"data source {shown(path)!r} has no records; put documents there or remove the source")
        records = cursor.index
        cursor.epoch += 1
        cursor.index = 0
        cursor.reader.rewind()
        self._note_epochs()
        if self._quarantine.logs:
            path = shown(self.sources[source].path)
            _log.info(
                "data source finished a pass; starting the next one",
                path=path,
                records=records,
                epochs=cursor.epoch,
            )
        # One of several ranks may see too few records of a small corpus to judge it.
        if self._world_size == 1 and min(self.counters.epochs) >= 1:
            self._quarantine.check()
        self._check_usable(source, records)

    def _check_usable(self, source: int, records: int) -> None:
        """Raise if no source gave a usable document in its last full pass; warn about a single source.

        With several ranks, a rank needs several passes to see all records of a small source.
        """
        cursor = self._cursors[source]
        if cursor.fruitful:
            cursor.own_read, cursor.fruitful = 0, False
            return
        if cursor.barren or cursor.own_read < min(records, MIN_RECORDS):
            return
        cursor.barren = True
        counters = self.counters
        if all(other.barren for other in self._cursors):
            held_out = f", {counters.held_out} held out" if counters.held_out else ""
            not_cut = f", {counters.not_cut} with characters of too many tokens to cut" if counters.not_cut else ""
            too_long = f", {counters.too_long} prompts too long" if counters.too_long else ""
            advice = "lower data.min_prefix or data.suffix_length, or give longer documents"
            if counters.too_long:
                advice = "raise data.max_prefix and data.suffix_length, or give shorter prompts"
            if counters.not_cut and not counters.too_short:
                advice = "raise data.suffix_length and data.max_prefix, or give other documents"
            raise DataError(
                f"a full pass over data.sources gave no usable document (so far {counters.read} read, "
                f"{counters.too_short} too short, {counters.malformed} malformed{held_out}{not_cut}{too_long}); "
                f"{advice}"
                f"{' that are not held out' if held_out else ''}"
            )
        _log.warning(
            "data.sources[%d] %r gave no usable document in a full pass of %d records; its share goes to the others",
            source,
            self.sources[source].path,
            records,
        )

    def _note_epochs(self) -> None:
        self.counters.epochs = tuple(cursor.epoch for cursor in self._cursors)
