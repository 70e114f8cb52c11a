"""The password of a Redis server: out of a file or the environment, never out of a command line or a configuration."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_rlpt.errors import ConfigError

VARIABLE = "RLPT_BUFFER_PASSWORD"
"""Environment variable that is read where no file is named."""


def read_password(file: str) -> str | None:
    """The password in ``file`` (white space at the end is not part of it), or of the environment; None is none.

    Raises:
        ConfigError: the file cannot be read, is empty, or can be read by others.
    """
    if not file:
        return os.environ.get(VARIABLE) or None
    try:
        with Path(file).open(encoding="utf-8") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(f"{file} has mode {mode:04o}, so others can read the password; run: chmod 600 {file}")
            password = handle.read().rstrip()
    except OSError as error:
        raise ConfigError(f"buffer.password_file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"buffer.password_file {file} is not text in UTF-8") from None
    if not password:
        raise ConfigError(f"buffer.password_file {file} is empty; write the password into it")
    return password
