"""Opens a checkpoint and verifies it against its manifest before any of it is used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.checkpoint.manifest import (
    CheckpointManifest,
    FileSum,
    share_of,
    summary,
    wrong_contents,
    wrong_sizes,
)
from megatron_rlpt.distributed.ranks import Ranks

MARKER = "COMPLETE"
MANIFEST = "manifest.json"
POLICY = "policy"
STATE = "state.json"
MODEL = "hf"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: CheckpointManifest
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return int(self.state["step"])

    @property
    def policy(self) -> Path:
        """Folder of the policy's own state."""
        return self.folder / POLICY

    @property
    def model(self) -> Path:
        """Folder with the configuration and tokenizer files of the starting model."""
        return self.folder / MODEL


def open_checkpoint(folder: Path, ranks: Ranks) -> tuple[Checkpoint | None, str]:
    """Open a published checkpoint and compare every file with its manifest; a collective that splits files among ranks.

    Sizes are checked first: that costs nothing and finds files truncated by a copy or a full disk.

    Returns:
        The checkpoint and "", or None and one line that names the damaged files.
    """
    manifest, wrong = ranks.broadcast(_read_manifest(folder) if ranks.is_main else (None, ""))
    if manifest is None:
        return None, wrong
    own = share_of(manifest.files, ranks.rank, ranks.size)
    for look in (wrong_sizes, wrong_contents):
        found = look(folder, own)
        ranks.barrier(f"the end of its part in checking {folder.name}")
        phrases = [phrase for part in ranks.all_gather(found) for phrase in part]
        if phrases:
            return None, summary(phrases)
    state, wrong = ranks.broadcast(_read_state(folder / STATE) if ranks.is_main else ({}, ""))
    return (None, wrong) if wrong else (Checkpoint(folder, manifest, state), "")


def _read_state(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return json.loads(path.read_text(encoding="utf-8")), ""
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read ({error})"


def _read_manifest(folder: Path) -> tuple[CheckpointManifest | None, str]:
    marker, path = folder / MARKER, folder / MANIFEST
    try:
        if not marker.is_file():
            return None, f"it has no {MARKER} marker, so it is incomplete"
        if not path.is_file():
            return None, f"it has no {MANIFEST}; the file is missing, or an older version wrote the checkpoint"
        if FileSum.of(path).checksum != marker.read_text(encoding="utf-8").strip():
            return None, f"{path} has changed since it was written (checksum)"
        return CheckpointManifest.read(path), ""
    except (OSError, ValueError) as error:
        return None, f"{path} cannot be read ({error})"
