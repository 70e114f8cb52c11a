"""Where a rollout engine runs, which decides how weights reach it."""

from __future__ import annotations

from enum import Enum


class EngineMode(Enum):
    """Where the engine runs; the value says why its weights take the way they take."""

    IN_PROCESS = "in this process, which hands its tensors over"
    OWN_PROCESS = "in a process of its own without a GPU, weights go through shared memory"
    SHARED_GPU = "in a process of its own on the trainer's GPU, weights go by CUDA IPC"
    OWN_GPU = "in a process of its own on another GPU, weights go by NCCL"
