"""Teacher servers that are announced in the rollout buffer, in addition to those in the configuration.

An announcement names the roles that the server's model has, so that a worker asks each server for what it serves.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence

from megatron_rlpt.config import Config, EndpointConfig, Role, RoleModel
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
_ROLES = "roles"


def announcement(endpoint: EndpointConfig, roles: Collection[Role] = tuple(Role)) -> str:
    """Return the value to announce for ``endpoint``, whose model has ``roles``.

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
    values = {name: value for name, value in dataclasses.asdict(endpoint).items() if name in _TYPES}
    return json.dumps(values | {_ROLES: sorted(roles)})


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
    configured: Sequence[EndpointConfig],
    announced: Mapping[str, str],
    key_env: str = "",
    roles: Collection[Role] = (),
) -> list[EndpointConfig]:
    """Return ``configured`` plus the ``announced`` servers at other addresses whose model has all of ``roles``.

    Announced servers get the key in ``key_env`` and no other. If announcements could name a variable, anyone who can
    announce could have any variable of a worker sent anywhere. Logs and skips invalid announcements.
    """
    found = {endpoint.url.rstrip("/"): endpoint for endpoint in configured}
    for name in sorted(announced):
        try:
            endpoint, served = _read(announced[name])
        except ConfigError as error:
            # Log once: announcements are read every few seconds.
            if (name, announced[name]) not in _warned:
                _warned.add((name, announced[name]))
                _log.warning("announced teacher server ignored", name=name, reason=error)
            continue
        if served.issuperset(roles):
            found.setdefault(endpoint.url.rstrip("/"), dataclasses.replace(endpoint, api_key_env=key_env))
    return list(found.values())


def servers_of(config: Config, model: RoleModel, announced: Mapping[str, str]) -> list[EndpointConfig]:
    """Return the servers to ask for ``model``; ``announced`` is what the rollout buffer has."""
    return announced_endpoints(model.endpoints, announced, config.teacher.workers.key_env, model.roles)


def _read(text: str) -> tuple[EndpointConfig, frozenset[Role]]:
    """Return the server and the roles of its model: without a word, both."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError("it is not JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("url"), str):
        raise ConfigError("it is not an object with a url")
    roles = values.pop(_ROLES, list(Role))
    if not isinstance(roles, list) or not roles or not all(role in list(Role) for role in roles):
        raise ConfigError(f"{_ROLES} is not a list of {' and '.join(Role)}")
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
    return endpoint, frozenset(map(Role, roles))
