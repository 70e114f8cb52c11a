"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from megatron_rlpt.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore"]
