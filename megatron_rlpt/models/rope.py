"""Rotary position embedding: the settings that ``transformers`` reads from a ``config.json``. Imports no torch.

A ``config.json`` can hold them in two dictionaries (``rope_parameters`` of transformers 5, ``rope_scaling`` of earlier
releases) and at its top level. The precedence is that of ``modeling_rope_utils.py: RotaryEmbeddingConfigMixin``
(``convert_rope_params_to_dict``, ``standardize_rope_params``, ``validate_rope``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError

_ORIGINAL = "original_max_position_embeddings"
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _ORIGINAL),
}
"""Type -> required entries of transformers."""
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
_FOLLOW_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of whole heads, the same in every layer and for every sequence length."""

    theta: float
    kind: str = "default"
    """``default``, ``linear``, ``llama3`` or ``yarn``."""
    settings: tuple[tuple[str, float], ...] = ()
    """Further entries of ``kind``: (name in ``config.json``, value)."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Return all settings as transformers 5 writes them into ``rope_parameters``."""
        return {"rope_type": self.kind, "rope_theta": self.theta} | dict(self.settings)


def parse_rope(raw: Mapping[str, Any], path: Path, default_theta: float) -> Rope:
    """Read the rotary settings from the entries ``raw`` of a ``config.json``.

    Args:
        raw: the entries.
        path: the file, for errors.
        default_theta: the base if none is given.

    Raises:
        ModelError: a setting is missing, not a number, or not supported.
    """
    entries = _in_force(raw, path)
    kind = entries.get("rope_type", entries.get("type", "default"))
    theta = _number(entries.get("rope_theta", raw.get("rope_theta", default_theta)), "rope_theta", path)
    part = entries.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part is not None and part != 1.0:
        raise ModelError(f"{path}: partial_rotary_factor is {part}; supported: 1.0")
    if kind in _FOLLOW_LENGTH:
        raise ModelError(
            f"{path}: rope type {kind!r} is not supported: its frequencies depend on the sequence length; "
            f"supported: {', '.join(_REQUIRED)}"
        )
    if kind not in _REQUIRED:
        raise ModelError(f"{path}: rope type {kind!r} is not supported; supported: {', '.join(_REQUIRED)}")
    values = dict(entries)
    if _ORIGINAL in _REQUIRED[kind]:
        values[_ORIGINAL] = raw.get(_ORIGINAL, values.get(_ORIGINAL, raw.get("max_position_embeddings")))
    missing = [name for name in _REQUIRED[kind] if name not in values]
    if missing:
        raise ModelError(f"{path}: rope type {kind!r} lacks {', '.join(missing)}; copy the model's own config.json")
    if kind == "yarn" and values["factor"] is None:  # from the two lengths, as transformers does
        values["factor"] = _number(raw.get("max_position_embeddings"), "max_position_embeddings", path) / _number(
            values[_ORIGINAL], _ORIGINAL, path
        )
    settings = [(name, _number(values[name], name, path)) for name in _REQUIRED[kind]]
    for name in _OPTIONAL.get(kind, ()):
        if name == "truncate" and name in values:  # null is false
            settings.append((name, bool(values[name])))
        elif values.get(name) is not None:
            settings.append((name, _number(values[name], name, path, least=0.0)))
    return Rope(theta, kind, tuple(settings))


def _in_force(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the dictionary that counts: a nonempty ``rope_scaling`` overrides ``rope_parameters``."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    entries = raw.get(name) or {}
    if not isinstance(entries, Mapping):
        raise ModelError(f"{path}: {name} is {entries!r}; it must be an object")
    nested = [key for key, value in entries.items() if isinstance(value, Mapping)]
    if nested:
        raise ModelError(
            f"{path}: {name} has separate settings for {', '.join(nested)}; supported: the same for all layers"
        )
    return entries


def _number(value: Any, name: str, path: Path, least: float | None = None) -> float:
    """Return ``value`` if it is a finite number above 0, or at least ``least``; integers stay integers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ModelError(f"{path}: {name} is {value!r}; it must be a number")
    if value < least if least is not None else value <= 0:
        raise ModelError(f"{path}: {name} is {value}; it must be {'at least 0' if least is not None else 'above 0'}")
    return value
