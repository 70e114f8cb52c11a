"""What rollout engines have in common: the version they must hold, the tokens they stop at."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rlpt.errors import EngineError


def require_version(held: int | None, asked: int) -> None:
    """Refuse to generate under other weights than those asked for.

    Raises:
        EngineError: the engine holds another version, or none since an update failed.
    """
    if held is None:
        raise EngineError("the last weight update failed, so the engine's weights belong to no version")
    if held != asked:
        raise EngineError(
            f"rollouts of policy version {asked} were asked for, but the engine holds version {held}; "
            "update its weights first"
        )


def end_of_sequence(model_path: Path) -> list[int]:
    """End-of-sequence token ids that ``config.json`` of a Hugging Face folder names; none, one or several.

    An engine that is given no tokenizer does not look them up itself.
    """
    value = json.loads((model_path / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list) else [int(value)]
