"""Errors that a user can fix. Each has a one-line message (what is wrong, and what to do) and an exit code.

The command line prints ``error: <message>`` and exits with ``exit_code``. Any other exception is a bug and keeps its
traceback (exit code 1).
"""

from __future__ import annotations

import errno


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk or the quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RlptError(Exception):
    """Base of all errors caused by input, environment or a failed run."""

    exit_code = 10


class ConfigError(RlptError):
    """The configuration is wrong: unknown key, value out of range, contradicting fields."""

    exit_code = 2


class DataError(RlptError):
    """The corpus is missing, empty, unreadable, or has no usable document."""

    exit_code = 3


class ModelError(RlptError):
    """The model folder or tokenizer is unusable: missing, unsupported family, wrong vocabulary."""

    exit_code = 4


class EngineError(RlptError):
    """The rollout engine failed or refused weights: different names or shapes, wrong version, wrong sampling."""

    exit_code = 5


class EngineLostError(EngineError):
    """The process of an engine has ended."""


class TeacherError(RlptError):
    """The judge or the rewriter failed too often."""

    exit_code = 6


class TrainingError(RlptError):
    """The update failed, for instance because the loss is not finite."""

    exit_code = 7


class CheckpointError(RlptError):
    """A checkpoint could not be written, is incomplete, or does not belong to this run."""

    exit_code = 8


class RunStopped(RlptError):
    """The run stopped as requested, after a checkpoint to resume from."""

    exit_code = 75
    """``EX_TEMPFAIL`` of sysexits.h: try again."""


class ExperimentError(RlptError):
    """Runs of an experiment failed; the others are kept."""


class NothingLearntError(RlptError):
    """Too many steps left no example to learn from; the policy is not exported."""

    exit_code = 77


class BufferUnavailableError(RlptError):
    """The store of the rollout buffer is unreachable or unreadable."""

    exit_code = 9


class BufferConflictError(RlptError):
    """The rollout buffer belongs to another run, or another trainer has attached to it."""

    exit_code = 9


class BufferForgotError(BufferConflictError):
    """The rollout buffer no longer knows its trainer: it was emptied, or restored from an older state."""


class BufferHeldError(BufferConflictError):
    """A trainer that may be alive is attached to the rollout buffer."""

    def __init__(self, line: str, holder: str, until: float) -> None:
        """``holder`` has renewed its hold until ``until``, in seconds since the Unix epoch by the store's clock."""
        super().__init__(line)
        self.holder, self.until = holder, until


def not_written(what: object, error: OSError) -> RlptError:
    """Return the error for a run that cannot write ``what``: exit code 8 for a full disk, else 2."""
    if is_disk_full(error):
        return CheckpointError(f"{what} cannot be written ({error.strerror}); free space, then start again")
    return ConfigError(f"{what} cannot be written ({error.strerror}); choose another run.dir")
