"""Turn corpora into episodes: read, mix, shard over ranks, cut, shuffle, and resume at any episode.

In reading order:

- ``readers/``: one reader per storage format.
- ``stream.py``: documents of several sources, mixed by weight and sharded over ranks.
- ``episodes.py``: cut a document into episodes; choose the held-out ones.
- ``lane.py``: the shuffle buffer and the documents that fill it.
- ``episode_stream.py``: the episodes that a rank trains on.
- ``overlap.py``: find held-out documents in the corpus.
- ``quarantine.py``: count malformed records and lost bytes, and stop above a limit.
- ``survey.py``: find skipped and damaged files before a run starts.
"""

from megatron_rlpt.data.episode_stream import EpisodeStream
from megatron_rlpt.data.episodes import Cutter, Encode, heldout_episodes, heldout_texts
from megatron_rlpt.data.overlap import (
    HeldOut,
    Location,
    kept_from_second_measure,
    kept_from_teacher,
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
    "heldout_texts",
    "kept_from_second_measure",
    "kept_from_teacher",
    "kept_from_training",
    "open_source",
    "overlap_error",
    "require_apart",
    "survey_corpus",
]
