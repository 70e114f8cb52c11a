"""Indexed datasets, against files that Megatron's own builder writes."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import encode, settings
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_rlpt.config import SourceConfig, SourceFormat, load_config
from megatron_rlpt.data import BadRecord, Document, EpisodeStream, open_source
from megatron_rlpt.data.readers import indexed
from megatron_rlpt.errors import DataError
from megatron_rlpt.tokens.tokenizer import Vocabulary

EOD, BOS = 299, 298
VOCABULARY = Vocabulary(300, frozenset({EOD, BOS}), BOS, lambda tokens: bytes(tokens).decode())


def build(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """A dataset of documents, each of them a list of sequences."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(flat, dtype=torch.int64), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def words(seed: int, count: int) -> list[int]:
    return [97 + (seed * 7 + place) % 26 for place in range(count)]


def source(path: object, **more: object) -> SourceConfig:
    return SourceConfig(path=str(path), format=SourceFormat.megatron, **more)


def read_all(config: SourceConfig) -> list[list[int]]:
    reader = open_source(config, vocabulary=VOCABULARY)
    documents = []
    while (record := reader.read()) is not None:
        assert isinstance(record, Document), record
        documents.append(list(record.tokens))
    return documents


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_documents_are_those_of_megatrons_own_class(tmp_path, dtype):
    texts = [[words(0, 9), words(1, 5)], [words(2, 30)], [words(3, 1)]]
    prefix = build(tmp_path / "corpus.v1_text_document", texts, dtype)
    own = IndexedDataset(str(prefix))
    borders = own.document_indices
    expected = [
        np.concatenate([own[sequence] for sequence in range(first, last)]).tolist() for first, last in pairwise(borders)
    ]
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx", tmp_path, f"{tmp_path}/*.idx"):
        assert read_all(source(path)) == expected
    assert read_all(SourceConfig(path=str(prefix))) == expected, "found by itself"


def test_the_token_that_ends_documents_is_taken_off_and_divides_what_was_packed(tmp_path):
    one, two, three = words(1, 5), words(2, 6), words(3, 4)
    packed = [[BOS, *one, EOD, *two, EOD], [EOD, EOD], [three], []]
    prefix = build(tmp_path / "a", [[document] for document in packed[:2]] + [packed[2]] + [[[]]])
    assert read_all(source(prefix)) == [one, two, three]
    # No control token of the tokenizer, but the user knows better.
    custom = build(tmp_path / "b", [[[*one, 46, *two]]])
    assert read_all(source(custom)) == [[*one, 46, *two]]
    assert read_all(source(custom, eod=46)) == [one, two]


def test_a_document_without_end_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "LONGEST", 8)
    tokens = words(5, 27)
    assert read_all(source(build(tmp_path / "a", [[tokens[:13], tokens[13:]]]))) == [
        tokens[start : start + 8] for start in range(0, 27, 8)
    ]


def test_every_position_can_be_gone_back_to(tmp_path):
    documents = [[[*words(seed, 3 + seed), EOD, *words(seed, 2), EOD]] for seed in range(6)]
    for name in "ab":
        build(tmp_path / name, documents)
    reader = open_source(source(tmp_path), vocabulary=VOCABULARY)
    positions, records = [], []
    while True:
        positions.append(json.loads(json.dumps(reader.position)))
        if (record := reader.read()) is None:
            break
        records.append(record)
    assert len({record.id for record in records}) == len(records) == 24
    for place in (23, 0, 11, 5, 12):
        reader.seek(positions[place])
        assert reader.read() == records[place]
        assert reader.position == positions[place + 1]


def test_episodes_are_the_very_tokens_and_go_on_exactly(tmp_path):
    documents = [words(seed, 40) for seed in range(9)]
    prefix = build(tmp_path / "a", [[[*document, EOD]] for document in documents])

    def stream() -> EpisodeStream:
        return EpisodeStream(settings(source(prefix), buffer=6), encode, seed=1, vocabulary=VOCABULARY)

    reference = stream()
    episodes = reference.take(10)
    state = json.loads(json.dumps(reference.state_dict()))
    later = reference.take(60)
    for episode in (*episodes, *later):
        document = documents[int(episode.document.rpartition("#")[2])]
        start = episode.offset - len(episode.prefix)
        assert [*episode.prefix, *episode.suffix] == document[start : episode.offset + 4]
    resumed = stream()
    resumed.load_state_dict(state)
    assert resumed.take(60) == later


def test_a_blend_is_as_many_sources_with_their_weights(tmp_path):
    blend = "{path: '0.3 a 0.7 /d/b 0 c', format: megatron, weight: 2}"
    needed = ["run.dir=r", "model.path=m", "train.steps=1"]
    config = load_config(None, [*needed, f"data.sources=[{blend}, {{path: x y}}]"])
    assert [(part.path, pytest.approx(part.weight)) for part in config.data.sources] == [
        ("a", 0.6),
        ("/d/b", 1.4),
        ("x y", 1.0),
    ]


def refused(path: object) -> str:
    with pytest.raises(DataError) as caught:
        read_all(source(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_and_foreign_files_are_one_line_each(tmp_path):
    prefix = build(tmp_path / "good", [[words(seed, 20)] for seed in range(5)])
    index, data = (Path(f"{prefix}.{ending}").read_bytes() for ending in ("idx", "bin"))

    def damaged(name: str, index: bytes, data: bytes = data) -> str:
        (tmp_path / f"{name}.idx").write_bytes(index)
        (tmp_path / f"{name}.bin").write_bytes(data)
        line = refused(tmp_path / name)
        assert name in line
        return line

    assert "does not begin with MMIDIDX" in damaged("foreign", b"TNTIDX\0\0" + index[8:])
    assert "does not begin with MMIDIDX" in damaged("empty", b"")
    assert "version 2" in damaged("version", index[:9] + struct.pack("<Q", 2) + index[17:])
    assert "token type 7" in damaged("floats", index[:17] + b"\7" + index[18:])
    for cut in (20, 40, len(index) - 1):
        assert "cut.idx" in damaged("cut", index[:cut])
    assert "has the wrong size" in damaged("longer", index + b"123456789")
    assert "huge" in damaged("huge", index[:18] + struct.pack("<Q", 1 << 62) + index[26:])
    assert "half.bin is truncated: 100 bytes where its .idx needs 200" in damaged("half", index, data[:100])
    starts = 34 + 4 * 5
    assert "points beyond" in damaged("wild", index[:starts] + struct.pack("<q", 1 << 40) + index[starts + 8 :])
    assert "sequence of -1 tokens" in damaged("negative", index[:34] + struct.pack("<i", -1) + index[38:])
    borders = 34 + 12 * 5
    beyond = index[: borders + 8] + struct.pack("<q", 9) + index[borders + 16 :]
    assert "document 0 from sequence 0 to 9" in damaged("borders", beyond)
    (tmp_path / "good.bin").unlink()
    assert "good.bin does not exist" in refused(prefix)
    assert "names no indexed dataset" in refused(tmp_path / "nothing")
    assert "names no indexed dataset" in refused(f"{tmp_path}/none-*.idx")


def test_ids_that_the_tokenizer_does_not_have_are_found_at_the_start_and_while_reading(tmp_path):
    early = build(tmp_path / "early", [[words(0, 9)], [[97, 300]]])
    assert "holds token 300" in refused(early)
    assert "dataset again with this tokenizer" in refused(early)
    assert "holds token -5" in refused(build(tmp_path / "negative", [[[97, -5]]], np.int32))
    # Too far apart for the samples of the start.
    late = [97] * 500_000
    late[123_456] = 4000
    prefix = build(tmp_path / "late", [[words(0, 9)], [late]])
    reader = open_source(source(prefix), vocabulary=VOCABULARY)
    assert not isinstance(reader.read(), BadRecord)
    with pytest.raises(DataError, match=r"late.bin holds token 4000 in document 1, but the tokenizer .* 300 tokens"):
        reader.read()
