"""Corpora to episodes: read, mix, share out, cut, shuffle, and go on exactly where a run stopped."""

from megatron_rlpt.data.episode_stream import EpisodeStream
from megatron_rlpt.data.episodes import Cutter, Encode, heldout_episodes
from megatron_rlpt.data.overlap import (
    HeldOut,
    Location,
    kept_from_second_measure,
    kept_from_training,
    overlap_error,
    require_apart,
)
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.data.readers.documents import BadRecord, Document, Position, Reader
from megatron_rlpt.data.readers.sources import open_source
from megatron_rlpt.data.stream import DocumentStream, Drawn, StreamCounters
from megatron_rlpt.data.survey import survey_corpus

__all__ = [
    "BadRecord",
    "Cutter",
    "Document",
    "DocumentStream",
    "Drawn",
    "Encode",
    "EpisodeStream",
    "HeldOut",
    "Location",
    "Position",
    "Quarantine",
    "Reader",
    "StreamCounters",
    "heldout_episodes",
    "kept_from_second_measure",
    "kept_from_training",
    "open_source",
    "overlap_error",
    "require_apart",
    "survey_corpus",
]
