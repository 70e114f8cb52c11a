"""LoRA adapters in PEFT's format: a small folder of weights that vLLM applies to a base model while it serves that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError, first_line
from megatron_rlpt.tokens.control_tokens import known_special_tokens

CONFIG = "adapter_config.json"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for (vllm/config/lora.py: MaxLoRARanks)."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and its base."""

    folder: Path
    base: Path
    """Hugging Face folder of the model that it was trained on."""
    room: int
    """Least rank that vLLM has to make room for."""

    @property
    def name(self) -> str:
        """Name under which it is served, other than its base's."""
        name, base = self.folder.resolve().name, self.base.resolve().name
        return f"{name}-adapter" if name == base else name


def read_adapter(folder: str | Path) -> Adapter | None:
    """Return the adapter in ``folder``; None if there is none.

    Raises:
        ModelError: it is no LoRA adapter, its rank is larger than vLLM allows, or its base is not a local folder.
    """
    path = Path(folder) / CONFIG
    if not folder or not path.is_file():
        return None
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, base = raw.get("peft_type"), raw.get("r"), raw.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from None
    if kind != "LORA":
        raise ModelError(f"{path} has peft_type {kind!r}; allowed: LORA, the only kind that vLLM serves")
    room = next((one for one in _RANKS if type(rank) is int and 0 < rank <= one), None)
    if room is None:
        raise ModelError(f"{path} has r {rank!r}; allowed: 1 to {_RANKS[-1]}")
    if not isinstance(base, str) or not (Path(base) / "config.json").is_file():
        raise ModelError(
            f"{path} has base_model_name_or_path {base!r}; set it to the local Hugging Face folder of the model that "
            "the adapter was trained on"
        )
    return Adapter(Path(folder), Path(base), room)


def whole_model(folder: str | Path) -> Path:
    """Return the folder with configuration and tokenizer: that of the base if ``folder`` holds an adapter.

    Raises:
        ModelError: see ``read_adapter``.
    """
    adapter = read_adapter(folder)
    return adapter.base if adapter else Path(folder)


def special_tokens_of(folder: str) -> tuple[str, ...]:
    """Return the special tokens of the model in ``folder``, of an adapter its base's; none where they are unknown here.

    Args:
        folder: empty for a model that only its servers know.

    Raises:
        ModelError: a file of its tokenizer cannot be read.
    """
    if not folder:
        return ()
    try:
        whole = whole_model(folder)
    except ModelError:  # the base is on the servers' machine
        return ()
    return known_special_tokens(whole)
