"""The file ``run.json`` of a run folder: the run's configuration, and what it has published."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import CheckpointError, not_written
from megatron_rlpt.files import write_atomically

_FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """The content of ``run.json``."""

    config: dict[str, Any] = field(default_factory=dict)
    """By dotted key."""
    checkpointed: bool = False
    """Whether a checkpoint has ever been published."""
    exported: int | None = None
    """Number of steps of the policy in ``export/``; None without an export."""
    held_out: str | None = None
    """Digest of the documents kept out of training since the first step; empty if they have changed."""

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Return the record of the run folder, or None without one.

        Raises:
            CheckpointError: the record is unreadable.
        """
        path = folder / _FILE
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(known["config"]), bool(known["checkpointed"]), known["exported"], known.get("held_out"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}); restore it, or start over with --fresh"
            ) from None

    def write(self, folder: Path) -> None:
        """Write the record to the run folder.

        Raises:
            CheckpointError: the disk is full.
            ConfigError: the folder is not writable for another reason.
        """
        path = folder / _FILE
        try:
            write_atomically(path, json.dumps(asdict(self)))
        except OSError as error:
            raise not_written(path, error) from error
