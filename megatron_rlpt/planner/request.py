"""What is to be planned: a run, its models, and the GPUs there are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rlpt.config import Config
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.planner.hardware import Nodes
from megatron_rlpt.planner.judging import ANSWER_VARIATION


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned."""

    config: Config
    model: Architecture
    teacher: Architecture
    trainer: Nodes
    judges: Nodes
    """GPUs of the teacher; none where the trainer judges or nothing is judged."""
    judge_tensor: int
    """GPUs of one server of the teacher."""
    judge_fp8: bool
    """Whether the servers hold the teacher in fp8 (``rlpt teacher serve ... --quantization fp8``)."""
    answer_tokens: float
    """Mean length of a verdict."""
    trainer_price: float
    """US dollars per GPU and hour."""
    judge_price: float
    judge_workers: int | None = None
    """Judge workers; None is as many as take up every group at once, or fill the servers."""
    answer_variation: float = ANSWER_VARIATION
    """Standard deviation over mean of the length of a verdict."""
    prefix_tokens: int | None = None
    """Mean length of a prefix, for times and cost; None is ``data.max_prefix``, at which memory is planned anyway."""
    teacher_notes: tuple[str, ...] = ()
    """What was assumed about a teacher that the policy could not be."""

    @property
    def usual(self) -> Config:
        """The run with prefixes of mean length."""
        if self.prefix_tokens is None:
            return self.config
        return replace(self.config, data=replace(self.config.data, max_prefix=self.prefix_tokens))
