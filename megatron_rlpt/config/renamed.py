"""Keys that earlier releases had, for error messages and for checkpoints of that time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"teacher.place": "teacher.run_in", "evaluation.ngram_corpus": "evaluation.second_corpus"}
"""Old dotted key -> its key today."""

_SAMPLING = "rollouts are trained on, so they are sampled from the policy's full distribution"
REMOVED = {"rollout.top_p": _SAMPLING, "rollout.top_k": _SAMPLING, "rollout.min_p": _SAMPLING}
"""Old dotted key -> why it is no longer an option."""


def with_new_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rename and drop old keys of ``flat``, the configuration by dotted key that a checkpoint holds."""
    return {RENAMED.get(key, key): value for key, value in flat.items() if key not in REMOVED}
