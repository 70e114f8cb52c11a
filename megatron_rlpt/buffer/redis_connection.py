"""The connection to a Redis server: requirements on the server, retries, and errors with their fixes."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar

from megatron_rlpt.backoff import Backoff
from megatron_rlpt.config.buffer_address import RedisAddress
from megatron_rlpt.errors import BufferUnavailableError, ConfigError, first_line
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)

_OLDEST = 7
"""Oldest major version of Redis that has every command of the script."""
_BACKOFF = Backoff(0.05, 2.0, jitter=0.5)
"""First and longest seconds between two attempts. Half is random, so that workers do not retry simultaneously."""
_LONGEST_ANSWER = 10.0
"""Seconds without a reply after which an attempt has failed."""
_TRANSIENT = ("LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "NOREPLICAS", "MISCONF", "OOM")
"""First words of error replies that are worth a retry."""

_Result = TypeVar("_Result")


class RedisConnection:
    """Calls operations of ``redis_store.lua`` on one buffer. Safe to use from several threads and forked processes."""

    def __init__(
        self, address: RedisAddress, key: str, password: str | None, retry: float, stopping: Callable[[], bool]
    ) -> None:
        """Connect, and check that the server will not drop keys.

        Args:
            address: where the server is.
            key: prefix of all keys of the buffer.
            password: of the server; None without one.
            retry: seconds to retry an operation while the server cannot be reached or used.
            stopping: returns whether to stop retrying early because the process is stopping.

        Raises:
            ConfigError: the package redis is not installed.
            BufferUnavailableError: the server cannot be reached, is too old, refuses the password, or would drop keys.
        """
        try:
            import redis
        except ImportError:
            raise ConfigError(f"{address} needs the package redis; run: pip install 'redis>=7'") from None
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._where = str(address)
        self._key = key
        self._retry = retry
        self._stopping = stopping
        patience = min(_LONGEST_ANSWER, max(retry, 1.0))
        self._client = redis.Redis(
            host=address.host,
            port=address.port,
            db=address.database,
            username=address.username or None,
            password=password,
            ssl=address.tls,
            socket_timeout=patience,
            socket_connect_timeout=patience,
            # Nested retries would multiply the time, so retry here only.
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        script = resources.files(__package__).joinpath("redis_store.lua").read_text(encoding="utf-8")
        self._script = self._client.register_script(script)
        self._check_server(self._retrying(self._client.info))

    def __repr__(self) -> str:
        return f"RedisConnection({self._where})"

    def call(self, operation: str, *arguments: str | bytes | int | float) -> list[Any]:
        """Run an operation and return ``[b"ok", result]``, or the name of a refusal and its details.

        The operation may run twice if the connection is lost before the reply arrives.

        Raises:
            BufferUnavailableError: the server could not be reached or used for ``retry`` seconds.
        """
        return self._retrying(lambda: self._script(keys=[self._key], args=[operation, *arguments]))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _retrying(self, work: Callable[[], _Result]) -> _Result:
        import redis

        deadline = time.monotonic() + self._retry
        failures = 0
        while True:
            try:
                return work()
            except redis.RedisError as error:
                failures += 1
                wait = _BACKOFF.delay(failures)
                if not _is_transient(error) or time.monotonic() + wait > deadline:
                    raise self._unavailable(error) from None
                if self._stopping():
                    raise BufferUnavailableError(
                        f"{self._where} cannot be reached or used ({first_line(error)}), and this process is stopping"
                    ) from None
            time.sleep(wait)

    def _check_server(self, info: dict[str, Any]) -> None:
        version, policy = str(info["redis_version"]), str(info.get("maxmemory_policy", "noeviction"))
        if int(version.split(".")[0]) < _OLDEST:
            raise BufferUnavailableError(
                f"{self._where} is Redis {version}; the rollout buffer needs {_OLDEST} or newer"
            )
        if policy != "noeviction":
            raise BufferUnavailableError(
                f"{self._where} drops keys, and groups with them, when its memory is full (maxmemory-policy {policy}); "
                "run: redis-cli CONFIG SET maxmemory-policy noeviction"
            )
        if not info.get("aof_enabled"):
            _log.warning(
                "Redis keeps no append-only file: when it stops, queued groups are lost and put again from the "
                "checkpoint; run: redis-cli CONFIG SET appendonly yes",
                server=self._where,
            )

    def _unavailable(self, error: Exception) -> BufferUnavailableError:
        import redis

        said = first_line(error)
        if isinstance(error.__cause__ or error.__context__, ssl.SSLCertVerificationError) or "CERTIFICATE" in said:
            what = (
                f"has a certificate that is not trusted ({said}); set the environment variable SSL_CERT_FILE to the "
                "file of its authority"
            )
        elif isinstance(error, redis.AuthenticationError):
            what = f"refuses the password ({said}); set RLPT_BUFFER_PASSWORD or buffer.password_file to the right one"
        elif isinstance(error, redis.exceptions.NoPermissionError):
            what = f"denies this user an operation of the buffer ({said}); allow it all commands on rlpt:* keys"
        elif isinstance(error, redis.exceptions.OutOfMemoryError) or said.startswith("OOM"):
            what = f"has been out of memory for {self._retry:g} s; raise its maxmemory"
        elif _is_transient(error):
            what = f"could not be reached or used for {self._retry:g} s ({said}); start it, or raise buffer.retry"
        else:
            what = f"refuses an operation of the rollout buffer: {said}"
        return BufferUnavailableError(f"{self._where} {what}")


def _is_transient(error: Exception) -> bool:
    import redis

    if isinstance(error, redis.AuthenticationError):
        return False
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return not isinstance(error.__context__, ssl.SSLCertVerificationError)
    # redis-py maps some of them to classes and strips their first word.
    return isinstance(error, _transient_classes()) or str(error).split(" ", 1)[0] in _TRANSIENT


def _transient_classes() -> tuple[type[Exception], ...]:
    from redis import exceptions

    return (
        exceptions.OutOfMemoryError,
        exceptions.ReadOnlyError,
        exceptions.ClusterDownError,
        exceptions.TryAgainError,
    )
