"""Check teacher servers: address, request fields, and that no key is in a place where it would be shown."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from megatron_rlpt.config.fields import check_values
from megatron_rlpt.config.schema import Config
from megatron_rlpt.config.schema_teacher import EndpointConfig
from megatron_rlpt.errors import ConfigError


def check_endpoints(config: Config) -> None:
    """Check the servers of a configuration; each may be listed once per role."""
    listed = {
        "teacher.workers.endpoints": config.teacher.workers.endpoints,
        "teacher.rewriter.endpoints": config.teacher.rewriter.endpoints,
    }
    for name, endpoints in listed.items():
        seen: set[str] = set()
        for index, endpoint in enumerate(endpoints):
            key = f"{name}[{index}]"
            check_endpoint(endpoint, key)
            if endpoint.url.rstrip("/") in seen:
                raise ConfigError(f"{key}.url is {endpoint.url}, which is listed already; list every server once")
            seen.add(endpoint.url.rstrip("/"))


def check_endpoint(endpoint: EndpointConfig, key: str) -> None:
    """Check one teacher server, configured or announced while running.

    Raises:
        ConfigError: names the field below ``key``, its value and what is allowed.
    """
    address, _, query = endpoint.url.partition("?")
    if not _is_address(address) or not _is_plain_query(query):
        # The value is not shown: its fault may be a password in it.
        raise ConfigError(
            f"{key}.url is not an address; allowed: http:// or https:// with a host, as http://host:8000/v1, without "
            "user and password, and a query without secrets, as ?api-version=2024-10-21 (a key goes into the variable "
            "that api_key_env names)"
        )
    if endpoint.api_key_env and not is_variable(endpoint.api_key_env):
        raise ConfigError(no_variable(f"{key}.api_key_env"))
    _check_key_header(endpoint, key)
    if endpoint.proxy not in ("", "env") and not _is_address(endpoint.proxy):
        raise ConfigError(
            f"{key}.proxy is not an address; allowed: http:// or https:// with a host, without user and password, or "
            "env (the proxy of the environment, with its password if it has one)"
        )
    _check_fields(endpoint, key)
    check_values(endpoint, key)


_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_HEADERS_OF_HTTP = re.compile(
    r"host|connection|cookie|date|expect|te|upgrade|via|(?:content|accept|transfer|proxy|sec|keep)-.*", re.IGNORECASE
)
_SECRETS = re.compile(r"key|token|secret|passw|auth|sig|cred|code", re.IGNORECASE)
"""Names in a query whose values no log should hold."""


def _check_key_header(endpoint: EndpointConfig, key: str) -> None:
    header = endpoint.key_header
    if (
        not _HEADER.fullmatch(header)
        or _HEADERS_OF_HTTP.fullmatch(header)
        or _LIKE_A_KEY.fullmatch(header.replace("-", ""))
    ):
        raise ConfigError(
            f"{key}.key_header is not the name of a header for a key; allowed: Authorization, or another name as "
            "api-key or x-api-key (the value given here is not shown, because it may be the key itself)"
        )
    if header != "Authorization" and not endpoint.api_key_env:
        raise ConfigError(f"{key}.key_header is {header}, and api_key_env names no key; set both or neither")


def _is_plain_query(query: str) -> bool:
    """Return whether ``query`` has no value that looks like a secret: addresses are logged and stored."""
    if not (query.isascii() and query.isprintable()) or "#" in query or " " in query:
        return False
    pairs = parse_qsl(query, keep_blank_values=True)
    return all(
        name and not _SECRETS.search(name) and len(value) < 64 and not _LIKE_A_KEY.fullmatch(value.replace("-", ""))
        for name, value in pairs
    )


_OURS = ("model", "messages", "prompt", "stream", "n", "prompt_logprobs")
"""Request fields that carry the question; they cannot be renamed, dropped or set."""
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_LIKE_A_KEY = re.compile(
    r"(?:sk|pk|rk|gsk|hf|r8|xai|ghp|gho|glpat|pplx|nvapi|csk|tgp|key|api|fw|dp|or|tp|AIza)_?[A-Za-z0-9]*[0-9][A-Za-z0-9_]{7,}"
    r"|(?=[A-Za-z0-9_]*[a-z])(?=[A-Za-z0-9_]*[0-9])[A-Za-z0-9_]{20,}"
    r"|[0-9A-Fa-f]{16,}|(?=[A-Z]*[0-9])[A-Z0-9]{20,}"
)


def no_variable(key: str) -> str:
    """Return the error for a field that may hold a key instead of its name; never repeats the value."""
    return (
        f"{key} is not the name of an environment variable; allowed: a name such as OPENAI_API_KEY; export the key "
        "under that name (the value given here is not shown, because it may be the key itself)"
    )


def is_variable(name: str) -> bool:
    """Return whether ``name`` can name a variable and does not look like a key."""
    return _VARIABLE.fullmatch(name) is not None and _LIKE_A_KEY.fullmatch(name) is None


def _check_fields(endpoint: EndpointConfig, key: str) -> None:
    """Check that fields change the form of a request but not its question."""
    targets = list(endpoint.rename.values())
    for option, names in (
        ("rename", [*endpoint.rename, *targets]),
        ("drop", endpoint.drop),
        ("add", list(endpoint.add)),
    ):
        for name in names:
            if name in _OURS or not _FIELD.fullmatch(name):
                raise ConfigError(
                    f"{key}.{option} names {name!r}; allowed: names of fields other than {', '.join(_OURS)}, which "
                    "carry the question"
                )
    if clash := sorted(set(targets) & {*endpoint.add, *endpoint.drop}) or sorted({*endpoint.rename} & {*endpoint.drop}):
        raise ConfigError(f"{key}: {clash[0]} is renamed, and dropped or added as well; keep one of them")
    if double := [name for name in targets if targets.count(name) > 1]:
        raise ConfigError(f"{key}.rename gives two fields the name {double[0]}; use every name once")
    if not _is_json(endpoint.add):
        raise ConfigError(
            f"{key}.add holds a value that JSON does not have; allowed: text, numbers, true, false, null, lists, maps"
        )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment or "@" in parts.netloc)
    written = url.isascii() and url.isprintable() and " " not in url
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and plain and written
