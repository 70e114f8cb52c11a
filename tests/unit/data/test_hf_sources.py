"""Sources of the ``datasets`` library: subsets, splits, and a position that must advance."""

from __future__ import annotations

import datasets
import pytest
from corpora import jsonl_bytes

from megatron_rlpt.config import SourceConfig, SourceFormat
from megatron_rlpt.data import open_source
from megatron_rlpt.errors import DataError


@pytest.fixture
def hub(tmp_path):
    """A dataset of two subsets, one of which has two splits."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: en.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n- config_name: de\n  data_files: de.jsonl\n---\n"
    )
    for name in ("en", "de", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl_bytes([f"{name} {index}" for index in range(5)]))
    return tmp_path


def hf(path, **fields) -> SourceConfig:
    return SourceConfig(path=str(path), format=SourceFormat.hf, **fields)


def test_a_subset_and_a_split_are_read(hub):
    assert open_source(hf(hub, subset="de")).read().text == "de 0"
    assert open_source(hf(hub, subset="en", split="test")).read().text == "test 0"


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({}, "set the source's subset to one of en, de"),
        ({"subset": "fr"}, "set the source's subset to one of en, de"),
        ({"subset": "en", "split": "dev"}, "set the source's split to one of train, test"),
    ],
)
def test_a_wrong_subset_or_split_is_answered_with_those_there_are(hub, fields, fix):
    with pytest.raises(DataError) as caught:
        open_source(hf(hub, **fields))
    assert str(caught.value).endswith(fix)
    assert "\n" not in str(caught.value)


def test_a_release_that_cannot_resume_is_refused(hub, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "5.0.0")
    with pytest.raises(DataError, match=r"datasets 5.0.0 .*pip install 'datasets>=5.0.1'"):
        open_source(hf(hub, subset="de"))


@pytest.mark.parametrize("fault", ["stands still", "leads back", "stands still later"])
def test_a_position_that_does_not_lead_to_the_next_row_is_refused(hub, monkeypatch, fault):
    """Release 5.0.0 always returns its first state; the installed one does not, so its fault is simulated."""
    stream, honest = datasets.IterableDataset, datasets.IterableDataset.state_dict
    asked = []

    def state_dict(self):
        asked.append(honest(self))
        return asked[0] if fault == "stands still" else asked[min(len(asked) - 1, 3)]

    if fault == "leads back":
        load = stream.load_state_dict
        monkeypatch.setattr(stream, "load_state_dict", lambda self, state: load(self, asked[0] if asked else state))
        monkeypatch.setattr(stream, "state_dict", lambda self: asked.append(honest(self)) or asked[-1])
    else:
        monkeypatch.setattr(stream, "state_dict", state_dict)

    def read():
        reader = open_source(hf(hub, subset="de"))
        assert fault == "stands still later"
        return [reader.position for _ in iter(reader.read, None)]

    with pytest.raises(DataError, match="the stream state to resume from does not advance at row"):
        read()


def test_text_as_bytes_and_a_nested_field(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"content": {"text": b"good"}}, {"content": {"text": b"\xff"}}, {"content": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for format in (SourceFormat.hf, SourceFormat.parquet):
        reader = open_source(SourceConfig(path=str(tmp_path), format=format, field="content.text"))
        good, *bad = iter(reader.read, None)
        assert good.text == "good"
        assert [type(record).__name__ for record in bad] == ["BadRecord"] * 2
        assert "not UTF-8" in bad[0].reason
