"""The episodes that policies are compared on: a fixed choice from documents that are never trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rlpt.config import DataConfig
from megatron_rlpt.data.episodes import Cutter, Encode, evenly_spread
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.data.readers.documents import BadRecord
from megatron_rlpt.data.readers.sources import open_source
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.tokens.tokenizer import Vocabulary
from megatron_rlpt.types import Episode


def heldout_episodes(
    config: DataConfig,
    count: int,
    encode: Encode,
    quarantine: Path | None = None,
    bos_id: int | None = None,
    starts_character: Callable[[int], bool] | None = None,
    vocabulary: Vocabulary | None = None,
) -> list[Episode]:
    """The first ``count`` episodes of ``data.heldout``: one per document, from its middle, in corpus order.

    Sources take turns by weight: the next document comes from the source that is furthest behind its share. Nothing is
    repeated, so a small corpus gives fewer than ``count``. The choice does not depend on a seed.

    Raises:
        ConfigError: ``data.heldout`` is empty, or ``data.add_bos`` without a BOS token.
        DataError: fewer than 2 documents can be used (a comparison needs two), or too many records are malformed.
    """
    if not config.heldout:
        raise ConfigError("data.heldout is empty; give at least one source of documents to compare policies on")
    cutter = Cutter(config, encode, bos_id, starts_character)
    bad = Quarantine(quarantine, config.max_bad_fraction)
    readers = {
        index: open_source(source, config.max_record_bytes, vocabulary) for index, source in enumerate(config.heldout)
    }
    bad.expect([(config.heldout[index].path, reader.sizes()) for index, reader in readers.items()])
    taken = [0] * len(config.heldout)
    episodes: list[Episode] = []
    not_cut = 0
    while readers and len(episodes) < count:
        index = min(readers, key=lambda index: (taken[index] / config.heldout[index].weight, index))
        record = readers[index].read()
        if record is None:
            del readers[index]
            continue
        bad.count(record, index)
        if isinstance(record, BadRecord):
            continue
        tokens = cutter.tokenize(record, config.heldout[index].control_tokens)
        offsets = cutter.offsets(tokens)
        if offsets:
            (offset,) = evenly_spread(offsets, 1)
            episodes.append(cutter.cut(config.heldout[index].path, record.id, tokens, offset))
            taken[index] += 1
        else:
            not_cut += cutter.is_long_enough(tokens)
    if not readers:
        bad.check()
        if len(episodes) < 2:
            short = bad.read - bad.malformed - len(episodes) - not_cut
            uncut = f", {not_cut} with characters of too many tokens to be cut" if not_cut else ""
            raise DataError(
                f"data.heldout has {len(episodes)} usable documents: {bad.read} read, {short} too short, "
                f"{bad.malformed} malformed{uncut}; give at least 2 documents of "
                f"{config.min_prefix + config.suffix_length} tokens or more"
            )
    return episodes
