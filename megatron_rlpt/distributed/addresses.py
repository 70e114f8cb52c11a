"""Addresses that servers of this package listen on: loopback unless the user sets another host."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _END = 10_000, 65_536
_ATTEMPTS = 64


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
    """Return a TCP port that is free on ``host`` now, at random.

    Another process may take it before its use, and a server may load a model for minutes first. So it is none of those
    that the system gives to outgoing connections, as long as others are free.

    Raises:
        OSError: ``host`` is not an address of this machine.
    """
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    lasting = _lasting_ports()
    # Not of the seeded generator: equal seeds must not lead to equal ports.
    for port in random.SystemRandom().sample(lasting, min(_ATTEMPTS, len(lasting))):
        with contextlib.suppress(OSError):
            return _bound(family, (address[0], port, *address[2:]))
    return _bound(family, address)


def _bound(family: socket.AddressFamily, address: tuple[Any, ...]) -> int:
    with socket.socket(family, socket.SOCK_STREAM) as free:
        free.bind(address)
        return int(free.getsockname()[1])


def _lasting_ports() -> list[int]:
    """Return the ports that Linux gives to no outgoing connection; none if that is not known."""
    try:
        first, last = map(int, _GIVEN_OUT.read_text().split())
    except (OSError, ValueError):
        return []
    return [*range(_LOWEST, first), *range(max(last + 1, _LOWEST), _END)]


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _in_url(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
