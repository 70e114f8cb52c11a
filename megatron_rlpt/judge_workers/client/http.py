"""HTTP exchanges with one server: a bounded JSON body or a ``ServerProblem``; proxies included."""

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
from megatron_rlpt.judge_workers.client.replies import is_content_filter, message_in
from megatron_rlpt.judge_workers.client.secrets import Mask

LARGEST_BODY = 4 << 20
"""Maximum bytes of a response; 512 tokens of text are a few KiB, log-probabilities about 90 bytes per token."""
_LARGEST_ERROR_BODY = 64 << 10
"""Maximum bytes of an error body, and seconds to read it; the status is known already."""
_ERROR_BODY_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 3.0
"""Less than the 5 s after which vLLM's server closes an idle connection, which would break the next request."""


BEARER = "Authorization"
"""Header that carries the key as a bearer token; any other header carries the plain key."""


class Connections:
    """Pooled connections to one server, with its key.

    Uses a proxy only if the endpoint names one, and the environment's only if that name is ``env``; ``SSL_CERT_FILE``
    is honored. Does not follow redirects, because the key is for this server only. Only connecting has a time limit
    here; the caller enforces the deadline of an answer.
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
            base_url: base of all paths; its query is added to every request.
            key: sent in ``key_header``; empty for none.
            count: maximum concurrent connections.
            deadline: maximum seconds per request; connecting may take at most half of it.
            proxy: see ``EndpointConfig.proxy``.
            key_header: see ``EndpointConfig.key_header``.

        Raises:
            ConfigError: the address or the proxy's address is invalid.
        """
        address, _, query = base_url.partition("?")
        route = proxy_for(address, proxy)
        self._mask = Mask(key, *route.secrets)
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
                transport=httpx.AsyncHTTPTransport(limits=limits, proxy=route.address or None),
                timeout=httpx.Timeout(None, connect=min(_CONNECT_SECONDS, deadline / 2)),
                follow_redirects=False,
                trust_env=False,
            )
        except (httpx.InvalidURL, ValueError) as error:
            reason = self._mask.text(first_line(error))
            raise ConfigError(f"endpoint url {base_url}, or its proxy, is not an address: {reason}") from None

    async def exchange(self, path: str, body: dict[str, Any] | None = None) -> Any | ServerProblem:
        """POST ``body``, or GET without one, and return the decoded JSON of the response.

        Raises only ``asyncio.CancelledError``.
        """
        # ASCII, so that lone surrogates, which UTF-8 cannot encode, reach the server as JSON escapes.
        content = None if body is None else json.dumps(body).encode("ascii")
        try:
            async with self._client.stream("GET" if body is None else "POST", path, content=content) as response:
                if response.status_code != 200:
                    return await self._error(response)
                data = await _read(response, LARGEST_BODY)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return ServerProblem(Fault.CONNECT, {"message": self._describe(error)})
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, UnicodeError, OSError) as error:
            return ServerProblem(Fault.BROKEN, {"message": self._describe(error)})
        if data is None:
            return ServerProblem(Fault.TOO_LARGE, {"limit": LARGEST_BODY})
        # Some servers echo a key that they reject, and their messages are logged.
        data = self._mask.data(data)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return ServerProblem(Fault.NOT_JSON, {"found": excerpt(data[:2000].decode("utf-8", "replace"))})

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _error(self, response: httpx.Response) -> ServerProblem:
        data: bytes | None = None
        with contextlib.suppress(TimeoutError, httpx.HTTPError, httpx.StreamError, OSError):
            async with asyncio.timeout(_ERROR_BODY_SECONDS):
                data = await _read(response, _LARGEST_ERROR_BODY)
        status = response.status_code
        data = self._mask.data(data or b"")
        fault = Fault.REFUSED if status < 500 and is_content_filter(data) else fault_of_status(status)
        detail = {"status": status, "message": excerpt(self._mask.text(message_in(data)))}
        return ServerProblem(fault, detail, _retry_after(response.headers.get("Retry-After", "")))

    def _describe(self, error: Exception) -> str:
        return excerpt(self._mask.text(f"{type(error).__name__}: {error}".rstrip(": ")))


async def _read(response: httpx.Response, limit: int) -> bytes | None:
    """Return the raw body, or None if it exceeds ``limit`` bytes."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def _retry_after(value: str) -> float:
    """Parse seconds from a number or a date (RFC 9110, 10.2.3); 0 for anything else."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


FROM_ENVIRONMENT = "env"
"""Value of ``EndpointConfig.proxy`` for HTTP_PROXY, HTTPS_PROXY and NO_PROXY."""


@dataclass(frozen=True)
class ProxyRoute:
    """A proxy; no address means a direct connection."""

    address: str = ""
    secrets: tuple[str, ...] = ()
    """Passwords to mask in logs."""


def proxy_for(url: str, proxy: str) -> ProxyRoute:
    """Return the proxy for ``url`` according to the endpoint's ``proxy`` setting."""
    address = proxy
    if proxy == FROM_ENVIRONMENT:
        parts = urlsplit(url)
        known = getproxies()
        address = known.get(parts.scheme) or known.get("all", "")
        if not address or proxy_bypass(parts.netloc):
            return ProxyRoute()
        address = address if "://" in address else f"http://{address}"
    password = urlsplit(address).password or ""
    return ProxyRoute(address, (password, unquote(password)))
