"""What a run folder records about its run besides checkpoints: ``run.json``, ``config.yaml`` and ``run-id``.

With ``run.json`` a run that was killed before its first checkpoint starts over, while a run whose checkpoints have
disappeared is refused. It also tells the export of an earlier, shorter run from the export of this one.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, Decay, SourceConfig, flatten, to_yaml
from megatron_rlpt.config.renamed import with_new_names
from megatron_rlpt.config.user_classes import is_same_class
from megatron_rlpt.errors import CheckpointError, not_written
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.teacher.judge_card import keep_cards

_log = get_logger(__name__)


_MAY_CHANGE = ("observe.", "evaluation.", "data.heldout[", "checkpoint.", "run.dir", "parallel.", "train.micro_batch",
               "train.logprob_chunk", "train.recompute", "train.max_stall", "train.empty_window",
               "train.max_empty_share", "train.deterministic", "optimizer.offload", "rollout.max_batch",
               "rollout.eager", "rollout.tensor", "rollout.expert", "rollout.placement", "rollout.max_logprob_gap",
               "teacher.max_failure_rate", "data.max_bad_fraction",
               "rollout.kv_cache_gib", "rollout.sync_bucket_mib", "rollout.warn_logprob_gap",
               "teacher.kv_cache_gib", "teacher.dtype", "teacher.workers.", "teacher.rewriter.endpoints",
               "buffer.")  # fmt: skip
"""Settings that a resumed run may change because they do not change what is learned; layout and micro-batch change the
last bits of sums. The held-out documents may change as well: from then on the stream leaves them out and logs that."""
_STEPS = "train.steps"
_OVERLAP = "data.heldout_overlap"
_NOTHING_HELD_OUT = "data.heldout"
"""Key of an empty list."""


def begin_record(folder: Path, config: Config, before: RunRecord | None, *, resumed: bool) -> None:
    """Create the run folder and write ``config.yaml``, the cards of the run's teachers, and the record of a run that
    starts or resumes.

    Args:
        folder: the run folder.
        config: the run.
        before: the folder's record so far.
        resumed: whether the run resumes from a checkpoint.
    """
    kept = before if before and resumed else RunRecord()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise not_written(f"run.dir {folder}", error) from error
    keep_cards(config, folder)
    RunRecord(flatten(config), resumed, kept.exported, kept.held_out).write(folder)


def update_record(folder: Path, **changes: Any) -> None:
    """Change fields of the folder's record."""
    record = RunRecord.read(folder) or RunRecord()
    changed = replace(record, **changes)
    if changed != record:
        changed.write(folder)


def record_held_out(folder: Path, digest: str, start: int) -> None:
    """Record the digest of the held-out documents, or that they have changed before step ``start``."""
    record = RunRecord.read(folder)
    known = record.held_out if record else None
    update_record(folder, held_out=digest if not start or known == digest else "")


def run_id(folder: Path) -> str:
    """Return the id that distinguishes this run from others of the same name; it is created once.

    Raises:
        CheckpointError: the stored id is damaged, or the disk is full.
        ConfigError: the folder is not writable for another reason.
    """
    file = folder / "run-id"
    try:
        known = file.read_text(errors="replace").strip() if file.exists() else ""
        if known and not known.isalnum():
            raise CheckpointError(f"{file} is damaged; restore it, or start over with --fresh")
        if not known:
            known = uuid.uuid4().hex
            write_atomically(file, known)
    except OSError as error:
        raise not_written(file, error) from error
    return known


def require_same_run(folder: Path, now: Mapping[str, Any], then: Mapping[str, Any], done: int) -> None:
    """Refuse to resume with settings that change what is learned.

    Args:
        folder: the run folder.
        now: the given configuration, by dotted key.
        then: the configuration of the run in the folder.
        done: completed steps of that run.

    Raises:
        CheckpointError: a setting differs; the error names it.
    """
    then = _with_new_options(with_new_names(then), now)
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) == then.get(key):
            continue
        if key.startswith(_MAY_CHANGE) or key == _NOTHING_HELD_OUT:
            continue
        if key == _OVERLAP:
            _log.warning("data.heldout_overlap has changed", overlap=now.get(key), before=then.get(key))
            continue
        if key == _STEPS:
            _require_other_length(folder, now, then, done)
            continue
        if is_same_class(key, now.get(key), then.get(key)):
            continue
        if key.endswith(".sha256") and now.get(key) and then.get(key):
            name = key.removesuffix(".sha256")
            raise CheckpointError(
                f"{folder} holds a run with another source of {name} = {then.get(name)} (SHA-256 {then[key][:12]}, now "
                f"{now[key][:12]}); put the old file back, choose another run.dir, or start over with --fresh"
            )
        raise CheckpointError(
            f"{folder} holds a run with {key} = {then.get(key)}, not {now.get(key)}; keep the old value, choose "
            "another run.dir, or start over with --fresh (which moves the folder aside)"
        )


def _with_new_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``then`` with the options of ``now`` that an older version did not have, at their defaults.

    A new option's default is what versions without it did.
    """
    defaults = flatten(Config())
    source = vars(SourceConfig())
    known = dict(then)
    for key in now.keys() - then.keys():
        item, _, name = key.rpartition("].")
        if key in defaults:
            known[key] = defaults[key]
        elif f"{item}].path" in then and name in source:
            known[key] = source[name]
    return known


def is_extendable(config: Mapping[str, Any]) -> bool:
    """Return whether a longer run would have had the same learning rates so far; ``config`` is by dotted key."""
    return config["optimizer.decay"] == Decay.constant.name or config["optimizer.lr"] == config["optimizer.min_lr"]


def require_started(folder: Path, record: RunRecord | None) -> None:
    """Refuse a folder with steps but no checkpoint, unless the record says that none was ever published.

    Raises:
        CheckpointError: the run had checkpoints, or the folder has no record.
    """
    if record is None or record.checkpointed:
        missing = "checkpoints are missing" if record else "checkpoint is missing"
        raise CheckpointError(
            f"{folder} holds steps of an earlier run but no checkpoint to resume from (its {missing}); restore it, "
            "start over with --fresh (which moves the folder aside), or choose another run.dir"
        )


def _require_other_length(folder: Path, now: Mapping[str, Any], then: Mapping[str, Any], done: int) -> None:
    steps, before = now[_STEPS], then[_STEPS]
    if not is_extendable(now):
        raise CheckpointError(
            f"{folder} holds a run with {_STEPS} = {before}, not {steps}, and optimizer.decay = "
            f"{now['optimizer.decay']} made every learning rate so far depend on it; to train its policy further, "
            f"start a new run with model.path={folder}/export and another run.dir (a run with "
            "optimizer.decay=constant can be extended)"
        )
    if steps < done:
        raise CheckpointError(f"{folder} holds {done} steps, more than {_STEPS} = {steps}; set it to {done} or more")
