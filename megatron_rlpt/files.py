"""New folders and files, written under names of their own and published by one rename.

Nothing that this process did not make is ever removed: a folder that ends in ``.old`` or ``.partial`` may be somebody's
only copy of a model. What a killed process leaves behind stays until its owner removes it, see ``unfinished``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from megatron_rlpt.errors import CheckpointError, RlptError, first_line
from megatron_rlpt.observe import get_logger

_log = get_logger(__name__)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK_TEXTS = ("no space left", "disk quota", "file too large", "file write failed", "iostream error")
"""What libraries make of an error of the operating system when they raise one of their own."""


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when the block ends well, and disappears when it does not.

    Args:
        target: does not exist, or is an empty folder, whose mode is kept. A symbolic link stands for what it leads to.
        replace: move an older ``target`` that holds something to ``<target>.old-1`` (or the next free number).

    Raises:
        CheckpointError: the disk is full or not writable, or somebody else has put something at ``target`` meanwhile.
    """
    target = Path(os.path.realpath(target))
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(target)
        # Not tempfile's: that is for its owner alone, and what is exported follows the umask.
        partial.mkdir()
        yield partial
        flush_tree(partial)
        if replace and target.is_dir() and any(target.iterdir()):
            _log.warning("keeping an earlier folder", path=_move_aside(target))
        elif target.is_dir():
            os.chmod(partial, target.stat().st_mode & 0o7777)
        os.rename(partial, target)  # refused by the system where target is a folder that holds something
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        # What already says what is wrong may be about the source, for instance one that cannot be read.
        if isinstance(error, OSError | SafetensorError) or (not isinstance(error, RlptError) and is_disk_error(error)):
            raise CheckpointError(
                f"{target} could not be written ({type(error).__name__}: {first_line(error)}); free space or mend the "
                "folder's permissions, then start again"
            ) from error
        raise


def write_file(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all; an older one is replaced.

    Raises:
        OSError: it cannot be written.
    """
    partial = beside(path)
    try:
        with partial.open("x", encoding="utf-8") as handle:
            handle.write(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def beside(target: Path) -> Path:
    """A name for what will become ``target``, in the same folder, that nobody else has."""
    return target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")


def unfinished(target: Path) -> list[Path]:
    """What killed processes, or ones that are still at work, have left where ``target`` was to be."""
    target = Path(os.path.realpath(target))
    named = re.compile(re.escape(target.name) + r"\.partial-[0-9a-f]{8}")
    try:
        return sorted(path for path in target.parent.iterdir() if named.fullmatch(path.name))
    except OSError:
        return []


def follow_umask(file: Path) -> None:
    """Give ``file``, which a library made for its owner alone, the mode that the folder around it has got."""
    os.chmod(file, file.parent.stat().st_mode & 0o666)


def is_disk_error(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, is the disk's: full, over its quota, read-only, not permitted."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK:
            return True
        if not isinstance(seen, CheckpointError) and any(text in str(seen).lower() for text in _DISK_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def flush_tree(folder: Path) -> None:
    """Have everything in ``folder`` on the disk itself; a network file system refuses what does not fit only now."""
    for path in (*(path for path in folder.rglob("*") if not path.is_symlink()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_name(target: Path) -> Path:
    """``<target>.old-1``, or with the next number that nobody has."""
    number = 1
    while (aside := target.with_name(f"{target.name}.old-{number}")).exists():
        number += 1
    return aside


def _move_aside(target: Path) -> Path:
    aside = free_name(target)
    os.rename(target, aside)
    return aside
