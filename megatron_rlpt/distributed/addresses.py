"""Addresses that servers of this package listen on: loopback unless the user sets another host."""

from __future__ import annotations

import ipaddress
import socket

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server on ``host``."""
    address = _literal(host)
    return address.is_loopback if address else host == "localhost"


def reachable(host: str) -> str:
    """Return the host part of a URL under which other machines reach a server that listens on ``host``.

    For a server on all addresses (``0.0.0.0``, ``::``) that is the machine's name.
    """
    address = _literal(host)
    if address is None:
        return host
    return socket.gethostname() if address.is_unspecified else _in_url(address)


def here(host: str) -> str:
    """Return the host part of a URL under which this machine reaches that server, without resolving its own name."""
    address = _literal(host)
    if address is None or not address.is_unspecified:
        return reachable(host)
    return "[::1]" if address.version == 6 else LOOPBACK


def free_port(host: str = LOOPBACK) -> int:
    """Return a TCP port that is free on ``host`` now; another process may take it before its use.

    Raises:
        OSError: ``host`` is not an address of this machine.
    """
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as free:
        free.bind(address)
        return int(free.getsockname()[1])


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _in_url(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
