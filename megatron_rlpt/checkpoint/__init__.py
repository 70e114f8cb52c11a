"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from megatron_rlpt.checkpoint.reading import Checkpoint
from megatron_rlpt.checkpoint.store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore"]
