"""Teacher servers that are announced in the rollout buffer, in addition to those in the configuration."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

from megatron_rlpt.config import EndpointConfig
from megatron_rlpt.config.endpoints import check_endpoint
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.log import get_logger

KIND = "endpoint"
"""Announcement kind of teacher servers (``RolloutBuffer.announce``)."""

_log = get_logger(__name__)

_warned: set[tuple[str, str]] = set()
_TYPES: dict[str, tuple[type, ...]] = {
    "url": (str,),
    "model": (str,),
    "weight": (int, float),
    "concurrency": (int,),
    "tokens_per_second": (int, float),
}
"""Without ``api_key_env``, see ``announced_endpoints``."""


def announcement(endpoint: EndpointConfig) -> str:
    """Return the value to announce for ``endpoint``.

    Raises:
        ConfigError: a field is out of range, or the endpoint has its own key. A server with its own key must be in the
            configuration; announced servers share the key of ``teacher.workers.key_env``.
    """
    check_endpoint(endpoint, "endpoint")
    if endpoint.api_key_env:
        raise ConfigError(
            f"endpoint.api_key_env is {endpoint.api_key_env}; allowed: nothing for a server that is announced; set "
            "teacher.workers.key_env, or put the server into teacher.workers.endpoints"
        )
    return json.dumps({name: value for name, value in dataclasses.asdict(endpoint).items() if name in _TYPES})


def server_key(variable: str) -> str:
    """Return the key in environment variable ``variable`` (``teacher.workers.key_env``); empty if none is named.

    Raises:
        ConfigError: the variable is named but not set to a key.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"teacher.workers.key_env is {variable}, which is not set to a key; export it, or leave key_env empty"
        )
    return key


def announced_endpoints(
    configured: Sequence[EndpointConfig], announced: Mapping[str, str], key_env: str = ""
) -> list[EndpointConfig]:
    """Return ``configured`` plus the ``announced`` servers at other addresses.

    Announced servers get the key in ``key_env`` and no other. If announcements could name a variable, anyone who can
    announce could have any variable of a worker sent anywhere. Logs and skips invalid announcements.
    """
    found = {endpoint.url.rstrip("/"): endpoint for endpoint in configured}
    for name in sorted(announced):
        try:
            endpoint = _read(announced[name])
        except ConfigError as error:
            # Log once: announcements are read every few seconds.
            if (name, announced[name]) not in _warned:
                _warned.add((name, announced[name]))
                _log.warning("announced teacher server ignored", name=name, reason=error)
            continue
        found.setdefault(endpoint.url.rstrip("/"), dataclasses.replace(endpoint, api_key_env=key_env))
    return list(found.values())


def _read(text: str) -> EndpointConfig:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError("it is not JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("url"), str):
        raise ConfigError("it is not an object with a url")
    for key, value in values.items():
        if key not in _TYPES:
            raise ConfigError(f"{key} is not among {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise ConfigError(f"{key} has the wrong type")
    endpoint = EndpointConfig(**values)
    check_endpoint(endpoint, "endpoint")
    import httpx  # here, because every command imports this module, also without httpx

    try:
        httpx.URL(endpoint.url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"its url is not an address: {error}") from None
    return endpoint
