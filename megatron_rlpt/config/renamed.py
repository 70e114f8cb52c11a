"""Keys that had another name in earlier releases, for error messages and for checkpoints of that time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"teacher.place": "teacher.run_in"}
"""Old dotted key -> the key it is now."""


def with_new_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Replace old keys in ``flat``, a configuration by dotted key that a checkpoint holds."""
    return {RENAMED.get(key, key): value for key, value in flat.items()}
