"""Checkpoints: everything that a run needs to resume with the same results as an uninterrupted run.

- ``store.py``: saves, publishes and loads checkpoints
- ``folders.py``: the checkpoint folder: names, publishing, retention, free space
- ``manifest.py``: every file of a checkpoint with size and checksum
- ``reading.py``: opens a checkpoint and verifies it against its manifest
- ``unpickling.py``: reads foreign torch checkpoints without running code from them
"""

from megatron_rlpt.checkpoint.reading import Checkpoint
from megatron_rlpt.checkpoint.store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore"]
