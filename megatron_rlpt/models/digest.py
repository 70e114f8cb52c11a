"""The content of a model folder as a short digest: equal for copies at any path, different after any change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_rlpt.errors import ModelError

_READ = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".distcp", ".pt", ".gguf")
_BLOCK = 1 << 22
_KNOWN: dict[tuple[str, int, int], bytes] = {}
"""(Path, size, time of change) -> digest of the file, for this process."""


def folder_digest(folder: str | Path, suffixes: Iterable[str] = _READ) -> str:
    """Return the digest (32 hex digits) of the names and bytes of a folder's files; subfolders are not read.

    A file is read once per process, at the speed of the disk (about 1 GB/s).

    Args:
        folder: of a model.
        suffixes: of the files that count.

    Raises:
        ModelError: the folder or a file cannot be read, or no file counts.
    """
    wanted, total = tuple(suffixes), hashlib.blake2b(digest_size=16)
    try:
        files = sorted(path for path in Path(folder).iterdir() if path.name.endswith(wanted) and path.is_file())
        for path in files:
            total.update(f"{path.name}\0".encode("utf-8", "surrogateescape") + _file_digest(path))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read ({error.strerror}); correct the path or its permissions") from None
    if not files:
        raise ModelError(f"{folder} holds no model; name a Hugging Face folder")
    return total.hexdigest()


def _file_digest(path: Path) -> bytes:
    facts = path.stat()
    key = (os.path.realpath(path), facts.st_size, facts.st_mtime_ns)
    if key not in _KNOWN:
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        _KNOWN[key] = digest.digest()
    return _KNOWN[key]
