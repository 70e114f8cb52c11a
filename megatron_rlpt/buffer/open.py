"""Opening the rollout buffer that a configuration, or an operator, names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rlpt.buffer.password import read_password
from megatron_rlpt.buffer.protocol import RolloutBuffer
from megatron_rlpt.config.buffer_address import check_name, parse_url

if TYPE_CHECKING:
    from megatron_rlpt.config import Config


def open_buffer(config: Config, *, create: bool = True, stopping: Callable[[], bool] = lambda: False) -> RolloutBuffer:
    """The buffer of a run, from ``config.buffer``; see ``open_url``.

    Raises:
        ConfigError: a wrong URL or name, or a password file that cannot be used.
        BufferUnavailableError: the store cannot be reached or used, or the buffer is not there.
    """
    settings = config.buffer
    return open_url(
        *place_of(config), password_file=settings.password_file, retry=settings.retry, create=create, stopping=stopping
    )


def place_of(config: Config) -> tuple[str, str]:
    """URL of a run's store, and the name of the run's buffer in it."""
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
    """The buffer ``name`` in the store at ``url``.

    Args:
        url: ``sqlite:///path``, ``redis://host:port/database`` or ``rediss://``.
        name: which of the store's buffers.
        password_file: see ``read_password``; for Redis only.
        retry: seconds to go on trying while the store cannot be reached, each time.
        create: False if the buffer has to be there.
        stopping: whether to give up before ``retry`` is over, as the process is to end; for Redis only, SQLite is a
            file of this machine.

    Raises:
        ConfigError: a wrong URL or name, or a password file that cannot be used.
        BufferUnavailableError: the store cannot be reached or used, or the buffer is not there.
    """
    address = parse_url(url)
    check_name(name)
    if isinstance(address, Path):
        from megatron_rlpt.buffer.sqlite_store import SqliteBuffer

        return SqliteBuffer(address, name, retry=retry, create=create)
    from megatron_rlpt.buffer.redis_store import RedisBuffer

    password = read_password(password_file)
    return RedisBuffer(address, name, password=password, retry=retry, create=create, stopping=stopping)
