"""URL and name of a rollout buffer, checked without touching the store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megatron_rlpt.errors import ConfigError

_ALLOWED = "sqlite:///path/to/file, redis://host:6379/0 or rediss://host:6379/0"
_SQLITE = "sqlite:///"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True)
class RedisAddress:
    """A Redis server and its database."""

    host: str
    port: int = 6379
    database: int = 0
    username: str = ""
    tls: bool = False

    def __str__(self) -> str:
        user = f"{self.username}@" if self.username else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{user}{host}:{self.port}/{self.database}"


def parse_url(url: str) -> Path | RedisAddress:
    """Return the SQLite file or the Redis server that ``url`` names.

    Raises:
        ConfigError: it names neither, or contains a password or options.
    """
    if url.startswith(_SQLITE) and len(url) > len(_SQLITE):
        return Path(url.removeprefix(_SQLITE))
    # What comes before an @ may be a password.
    shown = "not shown" if "@" in url else f"'{url}'"
    wrong = ConfigError(f"the rollout buffer's url is {shown}; allowed: {_ALLOWED}, without options")
    try:
        parts = urlsplit(url)
        port = 6379 if parts.port is None else parts.port
    except ValueError:
        raise wrong from None
    if parts.password is not None:
        raise ConfigError(
            "the rollout buffer's url has a password, which process lists and config.yaml would show; put it "
            "into RLPT_BUFFER_PASSWORD or a file of mode 0600 named by buffer.password_file"
        )
    database = parts.path.removeprefix("/") or "0"
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.query or parts.fragment or not port:
        raise wrong
    if not re.fullmatch(r"[0-9]{1,9}", database):
        raise wrong
    tls = parts.scheme == "rediss"
    return RedisAddress(parts.hostname, port, int(database), unquote(parts.username or ""), tls)


def check_name(name: str) -> None:
    """Raise ConfigError where ``name`` cannot name a buffer."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the rollout buffer's name is '{name}'; allowed: up to 100 letters, digits, '.', '_' and '-'; set "
            "buffer.name, which defaults to the name of run.dir"
        )
