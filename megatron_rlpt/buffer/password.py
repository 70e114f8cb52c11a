"""The password of a Redis server: out of a file or the environment, never out of a command line or a configuration."""

from __future__ import annotations

import os

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.files import read_private

VARIABLE = "RLPT_BUFFER_PASSWORD"
"""Environment variable that is read where no file is named."""


def read_password(file: str) -> str | None:
    """The password in ``file`` (white space at the end is not part of it), or of the environment; None is none.

    Raises:
        ConfigError: the file cannot be read, is empty, or can be read by others.
    """
    if not file:
        return os.environ.get(VARIABLE) or None
    password = read_private(file, "buffer.password_file").rstrip()
    if not password:
        raise ConfigError(f"buffer.password_file {file} is empty; write the password into it")
    return password
