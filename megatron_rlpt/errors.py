"""Errors a user can act on. Each carries one line (what is wrong, and the fix) and an exit code.

The command line prints ``error: <line>`` and leaves with ``exit_code``; anything that is not a ``RlptError`` is a
bug of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import errno


def is_disk_full(error: BaseException) -> bool:
    """Whether the operating system refused to write because disk or quota are used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def first_line(error: BaseException) -> str:
    """What ``error`` says, in one line: its first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RlptError(Exception):
    """Base of every error caused by input, environment or a failed run."""

    exit_code = 10


class ConfigError(RlptError):
    """The configuration is wrong: unknown key, value out of range, fields that contradict each other."""

    exit_code = 2


class DataError(RlptError):
    """The corpus is missing, empty, unreadable or has no usable document."""

    exit_code = 3


class ModelError(RlptError):
    """The model folder or tokenizer cannot be used: missing, unsupported family, vocabulary that does not fit."""

    exit_code = 4


class EngineError(RlptError):
    """The rollout engine or a weight update was refused: names or shapes differ, wrong version, wrong sampling."""

    exit_code = 5


class TeacherError(RlptError):
    """The judge or the rewriter failed too often to go on."""

    exit_code = 6


class TrainingError(RlptError):
    """The update itself failed, for instance a loss that is not finite."""

    exit_code = 7


class CheckpointError(RlptError):
    """A checkpoint could not be written, is incomplete, or does not belong to this run."""

    exit_code = 8


class RunStopped(RlptError):
    """The run was asked to stop, has left a checkpoint and can be gone on with."""

    exit_code = 75
    """``EX_TEMPFAIL`` of sysexits.h: try again."""


class NothingLearntError(RlptError):
    """Steps pass and no example is left to learn from; the model is as good as untrained, and is not exported."""

    exit_code = 77


class BufferUnavailableError(RlptError):
    """The rollout buffer's store cannot be reached, opened or read."""

    exit_code = 9


class BufferConflictError(RlptError):
    """The rollout buffer belongs to another run, or another trainer has taken it over."""

    exit_code = 9


class BufferForgotError(BufferConflictError):
    """The rollout buffer does not know its trainer any more: it was emptied, or came back older than it was."""


class BufferHeldError(BufferConflictError):
    """The rollout buffer belongs to a trainer that may be alive."""

    def __init__(self, line: str, holder: str, until: float) -> None:
        """``holder`` renewed its hold up to ``until``, in seconds since the Unix epoch by the store's clock."""
        super().__init__(line)
        self.holder, self.until = holder, until


def not_written(what: object, error: OSError) -> RlptError:
    """The error of a run that cannot write ``what``: exit code 8 for a full disk, else 2."""
    if is_disk_full(error):
        return CheckpointError(f"{what} cannot be written ({error.strerror}); free space, then start again")
    return ConfigError(f"{what} cannot be written ({error.strerror}); choose another run.dir")
