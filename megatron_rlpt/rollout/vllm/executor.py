"""The executor of an engine with several worker processes, which ends with the trainer."""

from __future__ import annotations

from typing_extensions import override
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from megatron_rlpt.rollout.vllm.process import exit_with_parent, ignore_stop_signals


class WatchedExecutor(MultiprocExecutor):
    """vLLM's executor for one machine; the engine's process, in which it runs, ends when the trainer does.

    Its workers end with the engine's process: vLLM gives each a pipe for that.
    """

    @override
    def _init_executor(self) -> None:
        exit_with_parent()
        ignore_stop_signals()
        super()._init_executor()
