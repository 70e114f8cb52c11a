"""Open the rollout buffer that a configuration or an operator names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rlpt.buffer.protocol import RolloutBuffer
from megatron_rlpt.config.buffer_address import check_name, parse_url
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.files import read_private

if TYPE_CHECKING:
    from megatron_rlpt.config import Config

PASSWORD_VARIABLE = "RLPT_BUFFER_PASSWORD"
"""Environment variable with the password of the Redis server; used where no file is configured."""


def open_buffer(config: Config, *, create: bool = True, stopping: Callable[[], bool] = lambda: False) -> RolloutBuffer:
    """Open the buffer of a run from ``config.buffer``; see ``open_url``.

    Raises:
        ConfigError: URL, name or password file cannot be used.
        BufferUnavailableError: the store cannot be reached or used, or the buffer does not exist.
    """
    settings = config.buffer
    return open_url(
        *location_of(config),
        password_file=settings.password_file,
        retry=settings.retry,
        create=create,
        stopping=stopping,
    )


def location_of(config: Config) -> tuple[str, str]:
    """Return the URL of a run's store and the name of the run's buffer in it."""
    settings = config.buffer
    return (
        settings.url or f"sqlite:///{Path(config.run.dir) / 'buffer.sqlite'}",
        settings.name or Path(config.run.dir).resolve().name,
    )


def open_url(
    url: str,
    name: str,
    *,
    password_file: str = "",
    retry: float = 60.0,
    create: bool = True,
    stopping: Callable[[], bool] = lambda: False,
) -> RolloutBuffer:
    """Open the buffer ``name`` in the store at ``url``.

    Args:
        url: ``sqlite:///path``, ``redis://host:port/database`` or ``rediss://``.
        name: one of the store's buffers.
        password_file: see ``read_password``; for Redis only.
        retry: seconds to retry an operation while the store cannot be reached.
        create: False if the buffer must exist.
        stopping: returns whether to stop retrying early because the process is stopping; for Redis only.

    Raises:
        ConfigError: URL, name or password file cannot be used.
        BufferUnavailableError: the store cannot be reached or used, or the buffer does not exist.
    """
    address = parse_url(url)
    check_name(name)
    if isinstance(address, Path):
        from megatron_rlpt.buffer.sqlite_store import SqliteBuffer

        return SqliteBuffer(address, name, retry=retry, create=create)
    from megatron_rlpt.buffer.redis_store import RedisBuffer

    password = read_password(password_file)
    return RedisBuffer(address, name, password=password, retry=retry, create=create, stopping=stopping)


def read_password(file: str) -> str | None:
    """Return the password from ``file`` (trailing white space stripped), else from the environment; None without one.

    It is never read from the command line or a configuration, which other users can see.

    Raises:
        ConfigError: the file cannot be read, is empty, or is readable by others.
    """
    if not file:
        return os.environ.get(PASSWORD_VARIABLE) or None
    password = read_private(file, "buffer.password_file").rstrip()
    if not password:
        raise ConfigError(f"buffer.password_file {file} is empty; write the password into it")
    return password
