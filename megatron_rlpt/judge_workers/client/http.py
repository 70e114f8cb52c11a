"""One HTTP exchange: a bounded body or the reason why there is none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from megatron_rlpt.errors import ConfigError, first_line
from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem, excerpt, fault_of_status
from megatron_rlpt.judge_workers.client.replies import is_censorship, message_in
from megatron_rlpt.judge_workers.client.secrets import Mask

LARGEST_BODY = 4 << 20
"""Bytes of an answer that are read; 512 tokens of text are a few KiB, log-probabilities about 90 bytes a token."""
_LARGEST_COMPLAINT = 64 << 10
"""Bytes of an error's body that are read, and the seconds for them: the status has said already that it failed."""
_COMPLAINT_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 3.0
"""Less than the 5 s after which vLLM's server closes a connection, which else would break under the next request."""


BEARER = "Authorization"
"""Header in which a key is sent as a bearer token; in every other it stands alone."""


class Connections:
    """Pooled connections to one server, with its key.

    A proxy is used only when the endpoint names one, the environment's only when it says ``env``; ``SSL_CERT_FILE`` is.
    Redirects are not followed: the key is for this server only. The only time limits of its own are for connecting: an
    answer may take as long as the deadline, which the caller keeps.
    """

    def __init__(
        self,
        base_url: str,
        key: str,
        count: int,
        deadline: float,
        proxy: str = "",
        key_header: str = BEARER,
    ) -> None:
        """
        Args:
            base_url: what paths are relative to; its query goes with every request.
            key: sent in ``key_header``; empty is none.
            count: most connections at once.
            deadline: seconds one request may take; connecting takes at most half of it.
            proxy: see ``EndpointConfig.proxy``.
            key_header: see ``EndpointConfig.key_header``.

        Raises:
            ConfigError: the address, or the proxy's, is none.
        """
        address, _, query = base_url.partition("?")
        through = proxy_for(address, proxy)
        self._mask = Mask(key, *through.secrets)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            headers[key_header] = f"Bearer {key}" if key_header.lower() == BEARER.lower() else key
        limits = httpx.Limits(
            max_connections=count, max_keepalive_connections=count, keepalive_expiry=_KEEP_ALIVE_SECONDS
        )
        try:
            self._client = httpx.AsyncClient(
                base_url=address,
                params=query or None,
                headers=headers,
                transport=httpx.AsyncHTTPTransport(limits=limits, proxy=through.address or None),
                timeout=httpx.Timeout(None, connect=min(_CONNECT_SECONDS, deadline / 2)),
                follow_redirects=False,
                trust_env=False,
            )
        except (httpx.InvalidURL, ValueError) as error:
            said = self._mask.text(first_line(error))
            raise ConfigError(f"endpoint url {base_url}, or its proxy, is not an address: {said}") from None

    async def exchange(self, path: str, body: dict[str, Any] | None = None) -> Any | ServerProblem:
        """Decoded JSON of the answer to a POST of ``body``, or to a GET without one.

        Raises nothing but ``asyncio.CancelledError``.
        """
        # ASCII: half characters in a text, which UTF-8 cannot hold, then reach the server as JSON spells them.
        content = None if body is None else json.dumps(body).encode("ascii")
        try:
            async with self._client.stream("GET" if body is None else "POST", path, content=content) as response:
                if response.status_code != 200:
                    return await self._complaint(response)
                data = await _read(response, LARGEST_BODY)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return ServerProblem(Fault.CONNECT, {"message": self._what(error)})
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, UnicodeError, OSError) as error:
            return ServerProblem(Fault.BROKEN, {"message": self._what(error)})
        if data is None:
            return ServerProblem(Fault.TOO_LARGE, {"limit": LARGEST_BODY})
        # Some servers repeat a key that they do not know, and what they say is logged.
        data = self._mask.data(data)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return ServerProblem(Fault.NOT_JSON, {"found": excerpt(data[:2000].decode("utf-8", "replace"))})

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _complaint(self, response: httpx.Response) -> ServerProblem:
        data: bytes | None = None
        with contextlib.suppress(TimeoutError, httpx.HTTPError, httpx.StreamError, OSError):
            async with asyncio.timeout(_COMPLAINT_SECONDS):
                data = await _read(response, _LARGEST_COMPLAINT)
        status = response.status_code
        data = self._mask.data(data or b"")
        fault = Fault.REFUSED if status < 500 and is_censorship(data) else fault_of_status(status)
        detail = {"status": status, "message": excerpt(self._mask.text(message_in(data)))}
        return ServerProblem(fault, detail, _retry_after(response.headers.get("Retry-After", "")))

    def _what(self, error: Exception) -> str:
        return excerpt(self._mask.text(f"{type(error).__name__}: {error}".rstrip(": ")))


async def _read(response: httpx.Response, limit: int) -> bytes | None:
    """The body as sent, or None when it is longer than ``limit`` bytes; then the rest is not read."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def _retry_after(value: str) -> float:
    """Seconds, from a number or a date (RFC 9110, 10.2.3); 0 where there is neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


FROM_ENVIRONMENT = "env"
"""Value of ``EndpointConfig.proxy`` that means HTTP_PROXY, HTTPS_PROXY and NO_PROXY."""


@dataclass(frozen=True)
class Through:
    """A proxy, or none."""

    address: str = ""
    secrets: tuple[str, ...] = ()
    """What no log should hold."""


def proxy_for(url: str, proxy: str) -> Through:
    """The proxy for ``url`` when the endpoint says ``proxy``."""
    address = proxy
    if proxy == FROM_ENVIRONMENT:
        parts = urlsplit(url)
        known = getproxies()
        address = known.get(parts.scheme) or known.get("all", "")
        if not address or proxy_bypass(parts.netloc):
            return Through()
        address = address if "://" in address else f"http://{address}"
    password = urlsplit(address).password or ""
    return Through(address, (password, unquote(password)))
