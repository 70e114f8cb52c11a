"""The way to a server: straight, or through the proxy that its endpoint asks for."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

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
