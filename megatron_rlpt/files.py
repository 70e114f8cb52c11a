"""Files and folders that appear whole or not at all: written under a temporary name, then renamed.

Nothing that this process did not create is ever removed: a folder named ``.old`` or ``.partial`` may be a user's only
copy of a model. What a killed process leaves behind stays until its owner removes it, see ``unfinished``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_rlpt.errors import CheckpointError, ConfigError, RlptError, first_line

_log = logging.getLogger(__name__)  # the package ``observe`` imports this module
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK_TEXTS = ("no space left", "disk quota", "file too large", "file write failed", "iostream error")
"""How libraries word an error of the operating system when they raise one of their own types."""


def write_atomically(path: Path, text: str, *, mode: int = 0o666, replace: bool = True, durable: bool = True) -> None:
    """Write ``path`` whole or not at all. Arguments and errors as in ``open_atomically``."""
    with open_atomically(path, mode=mode, replace=replace, durable=durable) as file:
        file.write(text)


@contextlib.contextmanager
def open_atomically(path: Path, *, mode: int = 0o666, replace: bool = True, durable: bool = True) -> Iterator[TextIO]:
    """Open a temporary UTF-8 file in the folder of ``path``; it becomes ``path`` when the block succeeds.

    Args:
        path: the file to write; its folder exists.
        mode: permissions, limited by the umask.
        replace: replace an existing file.
        durable: flush the content to the disk before the rename. False for files that are rewritten every few seconds.

    Raises:
        FileExistsError: ``path`` exists and ``replace`` is false.
        OSError: the file cannot be written; an existing one is unchanged.
    """
    temporary = temporary_name(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        (os.replace if replace else os.link)(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_private(file: str | Path, setting: str) -> str:
    """Read a UTF-8 text file that only its owner may read, such as a password or a list of secrets.

    Args:
        file: the file.
        setting: name of the setting that holds its path, for errors.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or other users can read it.
    """
    try:
        with Path(file).open(encoding="utf-8") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"{setting} {file} has mode {mode:04o}, so others can read it; run: chmod 600 {file}")
            return handle.read()
    except OSError as error:
        raise ConfigError(f"{setting} {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{setting} {file} is not text in UTF-8") from None


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` when the block succeeds and is removed when it fails.

    Args:
        target: does not exist, or is an empty folder, whose mode is kept. A symbolic link is followed.
        replace: move an existing ``target`` that is not empty to ``<target>.old-1`` (or the next free number).

    Raises:
        CheckpointError: the disk is full or not writable, or another process has created ``target`` in the meantime.
    """
    target = Path(os.path.realpath(target))
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary_name(target)
        # Not tempfile.mkdtemp: that folder is private to its owner, but an export follows the umask.
        partial.mkdir()
        yield partial
        flush_tree(partial)
        if replace and target.is_dir() and any(target.iterdir()):
            aside = free_name(target, "old")
            os.rename(target, aside)
            _log.warning("keeping an earlier folder path=%s", aside)
        elif target.is_dir():
            os.chmod(partial, target.stat().st_mode & 0o7777)
        os.rename(partial, target)  # the operating system refuses a target that is a folder with content
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        # An RlptError already says what is wrong; it may be about the source, for instance an unreadable file.
        if isinstance(error, OSError) or (not isinstance(error, RlptError) and _is_write_error(error)):
            raise CheckpointError(
                f"{target} could not be written ({type(error).__name__}: {first_line(error)}); free space or mend the "
                "folder's permissions, then start again"
            ) from error
        raise


def temporary_name(target: Path) -> Path:
    """Return an unused name in the folder of ``target`` to write it under."""
    return target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")


def free_name(target: Path, suffix: str) -> Path:
    """Return ``<target>.<suffix>-1``, or the same with the next free number."""
    number = 1
    while (aside := target.with_name(f"{target.name}.{suffix}-{number}")).exists():
        number += 1
    return aside


def unfinished(target: Path) -> list[Path]:
    """Return what other processes, killed or still running, have written under temporary names of ``target``."""
    target = Path(os.path.realpath(target))
    named = re.compile(re.escape(target.name) + r"\.partial-[0-9a-f]{8}")
    try:
        return sorted(path for path in target.parent.iterdir() if named.fullmatch(path.name))
    except OSError:
        return []


def follow_umask(file: Path) -> None:
    """Give ``file``, which a library created private to its owner, the permissions of its folder."""
    os.chmod(file, file.parent.stat().st_mode & 0o666)


def flush(*paths: Path) -> None:
    """Flush files, or the entries of folders, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush everything in ``folder`` to the disk; some network file systems report a full disk only now."""
    flush(*(path for path in folder.rglob("*") if not path.is_symlink()), folder)


def is_disk_error(error: BaseException) -> bool:
    """Return whether the disk caused ``error``: full, over quota, read-only, or not permitted."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK:
            return True
        if not isinstance(seen, CheckpointError) and any(text in str(seen).lower() for text in _DISK_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _is_write_error(error: BaseException) -> bool:
    from safetensors import SafetensorError  # the launcher's environment has no safetensors and writes no folder

    return isinstance(error, SafetensorError) or is_disk_error(error)
