"""The input of the planner: a run, its models and its GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rlpt.config import Config, Role, RoleModel
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.planner.hardware import Nodes
from megatron_rlpt.planner.judging import ANSWER_VARIATION


@dataclass(frozen=True)
class PlannedServers:
    """A model of the teacher, and the GPUs of its servers."""

    arch: Architecture
    nodes: Nodes
    """None if the trainer judges."""
    tensor: int
    """GPUs of one server."""
    fp8: bool
    """Whether servers hold it in fp8."""


@dataclass(frozen=True)
class PlanRequest:
    """A run to plan."""

    config: Config
    model: Architecture
    teacher: Architecture
    trainer: Nodes
    judges: Nodes
    """GPUs of the teacher; none if the trainer judges or nothing is judged."""
    judge_tensor: int
    """GPUs of one teacher server."""
    judge_fp8: bool
    """Whether servers hold the teacher in fp8 (``rlpt teacher serve ... --quantization fp8``)."""
    answer_tokens: float
    """Mean length of a verdict."""
    trainer_price: float
    """US dollars per GPU and hour."""
    judge_price: float
    judge_workers: int | None = None
    """Judge workers; None for as many as hold all groups, or fill the servers."""
    answer_variation: float = ANSWER_VARIATION
    """Standard deviation over mean of the length of a verdict."""
    prefix_tokens: int | None = None
    """Mean length of a prefix, for times and cost; None for ``data.max_prefix``, which memory is always planned at."""
    teacher_notes: tuple[str, ...] = ()
    """Assumptions about a teacher of a family that is not supported as policy."""
    rewriter: PlannedServers | None = None
    """The rewriter's own model; None if it has the teacher's."""

    def servers_of(self, model: RoleModel) -> PlannedServers:
        """Return the servers of ``model`` (``config.models_asked``)."""
        if self.rewriter is not None and model.who == Role.rewriter:
            return self.rewriter
        return PlannedServers(self.teacher, self.judges, self.judge_tensor, self.judge_fp8)

    @property
    def server_gpus(self) -> int:
        """GPUs of all servers of the teacher."""
        return self.judges.gpus + (self.rewriter.nodes.gpus if self.rewriter else 0)

    @property
    def mean_config(self) -> Config:
        """The run with prefixes of mean length."""
        if self.prefix_tokens is None:
            return self.config
        return replace(self.config, data=replace(self.config.data, max_prefix=self.prefix_tokens))
