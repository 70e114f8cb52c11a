"""What a run folder says about its run, besides checkpoints: ``run.json``.

With it a run that was killed before its first checkpoint starts over by itself, while one whose checkpoints have
vanished does not; and an export that an earlier, shorter run has left is not taken for that of this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Decay
from megatron_rlpt.config.renamed import with_new_names
from megatron_rlpt.errors import CheckpointError, not_written
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)

FILE = "run.json"
"""Name in ``run.dir``."""

_MAY_CHANGE = ("observe.", "evaluation.", "data.heldout[", "checkpoint.", "run.dir", "parallel.", "train.micro_batch",
               "train.logprob_chunk", "train.recompute", "train.max_stall", "train.empty_window",
               "train.max_empty_share", "optimizer.offload", "rollout.max_batch",
               "rollout.max_logprob_gap", "teacher.max_failure_rate", "data.max_bad_fraction",
               "rollout.kv_cache_gib", "rollout.sync_bucket_mib", "rollout.warn_logprob_gap",
               "teacher.kv_cache_gib", "teacher.workers.", "buffer.")  # fmt: skip
"""Configuration that a resumed run may change, because it does not change what is learned; layout and micro-batch
change the last bits of sums. What is held out may change as well: the stream leaves it out from then on and says so."""
_STEPS = "train.steps"
_OVERLAP = "data.heldout_overlap"
_NOTHING_HELD_OUT = "data.heldout"
"""Key of an empty list."""


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells it."""

    config: dict[str, Any] = field(default_factory=dict)
    """By dotted key."""
    checkpointed: bool = False
    """Whether a checkpoint has ever been published."""
    exported: int | None = None
    """Steps behind the policy in ``export/``; None without one."""
    held_out: str | None = None
    """Digest of what was kept out of training from the first step to the last; empty if that has changed."""

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """That of ``folder``; None where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = folder / FILE
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(known["config"]), bool(known["checkpointed"]), known["exported"], known.get("held_out"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}); bring it back, or start anew with --fresh"
            ) from None

    def write(self, folder: Path) -> None:
        """Put it in the place of the one before.

        Raises:
            CheckpointError: the disk is full.
            ConfigError: the folder cannot be written for another reason.
        """
        path = folder / FILE
        try:
            write_atomically(path, json.dumps(asdict(self)))
        except OSError as error:
            raise not_written(path, error) from error


def require_same_run(folder: Path, now: Mapping[str, Any], then: Mapping[str, Any], done: int) -> None:
    """Refuse to go on with a run that learns otherwise than it did.

    Args:
        folder: of the run.
        now: configuration that was given, by dotted key.
        then: that of the run in the folder.
        done: steps that are behind the run.

    Raises:
        CheckpointError: names what differs.
    """
    then = with_new_names(then)
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) == then.get(key):
            continue
        if key.startswith(_MAY_CHANGE) or key == _NOTHING_HELD_OUT:
            continue
        if key == _OVERLAP:
            _log.warning("held-out documents are treated otherwise from now on", overlap=now.get(key),
                         before=then.get(key))  # fmt: skip
            continue
        if key == _STEPS:
            _require_other_length(folder, now, then, done)
            continue
        raise CheckpointError(
            f"{folder} holds a run with {key} = {then.get(key)}, not {now.get(key)}; keep the old value, choose "
            "another run.dir, or start anew with --fresh (which moves the folder aside)"
        )


def is_extendable(config: Mapping[str, Any]) -> bool:
    """Whether the learning rates of a run (by dotted key) are those of a longer one, as far as it goes."""
    return config["optimizer.decay"] == Decay.constant.name or config["optimizer.lr"] == config["optimizer.min_lr"]


def require_started(folder: Path, record: RunRecord | None) -> None:
    """Refuse steps without a checkpoint, unless none has been published since the run started.

    Raises:
        CheckpointError: the run had checkpoints, or nobody knows.
    """
    if record is None or record.checkpointed:
        gone = "checkpoints are gone" if record else "checkpoint is not there"
        raise CheckpointError(
            f"{folder} holds steps of an earlier run but no checkpoint to go on from (its {gone}); bring it back, "
            "start anew with --fresh (which moves the folder aside) or choose another run.dir"
        )


def _require_other_length(folder: Path, now: Mapping[str, Any], then: Mapping[str, Any], done: int) -> None:
    steps, before = now[_STEPS], then[_STEPS]
    if not is_extendable(now):
        raise CheckpointError(
            f"{folder} holds a run with {_STEPS} = {before}, not {steps}, and optimizer.decay = "
            f"{now['optimizer.decay']} made every learning rate so far depend on it; to go on from its policy start a "
            f"new run with model.path={folder}/export and another run.dir (a run with optimizer.decay=constant can be "
            "made longer)"
        )
    if steps < done:
        raise CheckpointError(f"{folder} holds {done} steps, more than {_STEPS} = {steps}; set it to {done} or more")
