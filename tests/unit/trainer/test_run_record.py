"""``run.json`` where it cannot be written."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_rlpt.errors import CheckpointError, ConfigError
from megatron_rlpt.observe.run_json import RunRecord


@pytest.mark.parametrize(
    ("number", "error", "way_on"),
    [
        (errno.ENOSPC, CheckpointError, "free space, then start again"),
        (errno.EDQUOT, CheckpointError, "free space, then start again"),
        (errno.EACCES, ConfigError, "choose another run.dir"),
    ],
)
def test_a_full_disk_is_told_from_a_folder_that_may_not_be_written(tmp_path, monkeypatch, number, error, way_on):
    RunRecord({"a": 1}).write(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(error, match=way_on):
        RunRecord({"a": 2}).write(tmp_path)
    assert RunRecord.read(tmp_path) == RunRecord({"a": 1})
