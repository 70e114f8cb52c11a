"""Load tokenizers through ``transformers``, and remember what the policy's tokenizer takes from them.

``transformers`` imports torch to load any tokenizer: seconds of processor time and 200 MB in each of the many judge
workers, which need neither. A process without torch therefore reads ``<cache>/tokenizers/<key>.json``, which an earlier
one has written; the key covers the files of the folder, its path, the packages that read it and this module.
``<cache>`` is ``$XDG_CACHE_HOME/megatron_rlpt``, by default ``~/.cache/megatron_rlpt``, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError
from megatron_rlpt.files import write_atomically
from megatron_rlpt.plain_text import shortened

_READERS = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral-common", "protobuf")
"""Packages that decide how ``transformers`` reads a folder."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_KEPT = 16
"""Most files in the cache; a large vocabulary takes 10 MB."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What ``transformers`` makes of a tokenizer's files."""

    layout: dict[str, Any]
    """A decoded ``tokenizer.json``."""
    size: int
    """Number of ids, added tokens included."""
    bos_id: int | None
    unknown_id: int | None
    special_ids: list[int]


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """Load the ``transformers`` tokenizer of a local folder.

    Raises:
        ModelError: the folder has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    _require_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises any type for damaged files
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer in {path} asks to run code of its own (auto_map), which is never done; save it as a "
                "tokenizer.json that transformers reads without it"
            ) from None
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {shortened(str(error))}") from error


def tokenizer_facts(path: str | Path) -> TokenizerFacts:
    """Return the facts of the tokenizer in a local folder, from the cache where that saves the import of torch.

    Raises:
        ModelError: the folder has no tokenizer that can be loaded, or an unsupported kind.
    """
    if "torch" in sys.modules:
        return _load_facts(path)
    _require_folder(path)
    file = _cache_file(Path(path))
    # An optimization: what cannot be read or written is loaded.
    with contextlib.suppress(OSError, ValueError, TypeError):
        if file:
            facts = TokenizerFacts(**json.loads(file.read_text(encoding="utf-8")))
            os.utime(file)
            return facts
    facts = _load_facts(path)
    with contextlib.suppress(OSError):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(asdict(facts)), mode=0o600, durable=False)
            _remove_oldest(file.parent)
    return facts


def _require_folder(path: str | Path) -> None:
    if not Path(path).is_dir():
        raise ModelError(f"model folder {path} does not exist; give a Hugging Face folder")


def _load_facts(path: str | Path) -> TokenizerFacts:
    # Mistral's own implementation exposes neither bytes nor control tokens; this reads the same vocabulary.
    loaded = load_tokenizer(path, mistral_format=False)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer in {path} is a {type(loaded).__name__}, which exposes no tokens; use a folder with a "
            "tokenizer.json"
        )
    layout = json.loads(backend.to_str())
    return TokenizerFacts(layout, len(loaded), loaded.bos_token_id, loaded.unk_token_id, list(loaded.all_special_ids))


def _cache_file(folder: Path) -> Path | None:
    """Return where the facts of the tokenizer in ``folder`` are kept; None if that cannot be said."""
    digest = hashlib.sha256()
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        # transformers chooses the class of some tokenizers by their path.
        parts: list[bytes] = [str(folder).encode(), *(_version(name).encode() for name in _READERS)]
        parts.append(Path(__file__).read_bytes())
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix not in _WEIGHTS:
                parts += [file.name.encode(), file.read_bytes()]
    except (OSError, RuntimeError):  # of Path.home()
        return None
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return Path(home) / "megatron_rlpt/tokenizers" / f"{digest.hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[_KEPT:]:
        file.unlink(missing_ok=True)
