"""The record of a run folder: what cannot be written, and what another release or machine has written."""

from __future__ import annotations

import errno
import os

import pytest
from savables import OneFile, make_model

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.config import Role, flatten, load_config
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import CheckpointError, ConfigError
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.teacher.judge_card import kept_card, read_card, save_card
from megatron_rlpt.trainer.run import _find_checkpoint
from megatron_rlpt.trainer.run_record import begin_record, require_same_run

WORKERS = "teacher.run_in=workers"


def load(folder, *overrides):
    fields = [f"run.dir={folder}", "model.path=m", "train.steps=9", "data.sources=[{path: a.jsonl}]", *overrides]
    return load_config(None, fields)


def of_earlier_release(config, **values):
    """Return ``config`` by dotted key as a release with ``rollout.top_p`` and ``teacher.place`` recorded it."""
    flat = flatten(config)
    flat["teacher.place"] = flat.pop("teacher.run_in")
    return flat | {"rollout.top_p": 1.0, "rollout.top_k": -1} | values


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


def test_a_checkpoint_of_an_earlier_release_resumes(tmp_path):
    config = load(tmp_path, WORKERS)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(3, {"config": of_earlier_release(config)}, OneFile(), make_model(tmp_path / "model"))
    assert _find_checkpoint(tmp_path, store, None, config, Ranks()).step == 3
    with pytest.raises(CheckpointError, match=r"with teacher\.run_in = workers, not trainer"):
        _find_checkpoint(tmp_path, store, None, load(tmp_path), Ranks())


def test_a_key_that_no_release_had_is_another_run(tmp_path):
    config = load(tmp_path)
    require_same_run(tmp_path, flatten(config), of_earlier_release(config), 3)
    with pytest.raises(CheckpointError, match=r"with rollout\.top_q = 0\.9, not None"):
        require_same_run(tmp_path, flatten(config), of_earlier_release(config, **{"rollout.top_q": 0.9}), 3)


NEW = ("rollout.router_replay", "train.router_aux_loss", "data.sources[0].field")
"""Options that an earlier release may not have had."""


def test_options_that_an_earlier_release_did_not_have_are_as_it_ran(tmp_path):
    config = load(tmp_path)
    then = {key: value for key, value in flatten(config).items() if key not in NEW}
    require_same_run(tmp_path, flatten(config), then, 3)
    for now, change in (
        ("rollout.router_replay=true", "rollout.router_replay = False, not True"),
        ("data.sources=[{path: a.jsonl, field: body}]", r"data.sources\[0\].field = text, not body"),
        ("data.sources=[{path: a.jsonl}, {path: b.jsonl}]", r"data.sources\[1\].* = None, not "),
    ):
        with pytest.raises(CheckpointError, match=f"holds a run with {change}"):
            require_same_run(tmp_path, flatten(load(tmp_path, now)), then, 3)


def test_a_run_begins_with_what_is_known_about_its_teachers(tmp_path):
    judge, writer = tmp_path / "judge", tmp_path / "writer"
    for folder in (judge, writer):
        folder.mkdir()
    config = load(
        tmp_path / "run", WORKERS, "teacher.judge=generative", f"teacher.path={judge}",
        f"teacher.rewriter.path={writer}", "candidates.rewrite=true",
    )  # fmt: skip
    save_card(writer, "quality", config.teacher.generative, {"accuracy": 0.8, "pairs": 4})
    begin_record(tmp_path / "run", config, None, resumed=False)
    assert read_card(kept_card(tmp_path / "run", Role.rewriter)) == read_card(writer)
    assert read_card(kept_card(tmp_path / "run", Role.judge)) is None
