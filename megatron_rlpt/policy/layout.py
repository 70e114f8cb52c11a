"""The training layout: the parallel sizes, checks that a model can be split that way, and where each tensor is.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rlpt.config import ParallelConfig, TrainConfig
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_rlpt.models.families import Rule

_LARGEST_OFFERED = 64
"""Largest size that messages suggest."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; ``data`` follows from the world size."""

    world: int = 1
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_stages: int = 1
    context: int = 1
    expert: int = 1

    @property
    def data(self) -> int:
        """Data-parallel size: number of model replicas."""
        return self.world // self.replica

    @property
    def replica(self) -> int:
        """Number of ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    def describe(self) -> str:
        """Return the layout in one line."""
        parts = [f"TP{self.tensor}" + (" with sequence parallel" if self.sequence else ""), f"PP{self.pipeline}"]
        if self.virtual_stages > 1:
            parts[-1] += f" x {self.virtual_stages} virtual"
        parts += [f"CP{self.context}", f"EP{self.expert}", f"DP{self.data}"]
        return f"{self.world} rank{'s' if self.world > 1 else ''}: " + ", ".join(parts)


def layout_of(config: ParallelConfig, world: int) -> Layout:
    """Return the layout of ``config`` with ``world`` ranks.

    Raises:
        ConfigError: the world is not a multiple of one model replica.
    """
    layout = Layout(
        world=world,
        tensor=config.tensor,
        sequence=config.sequence,
        pipeline=config.pipeline,
        virtual_stages=config.virtual_stages,
        context=config.context,
        expert=config.expert,
    )
    if world % layout.replica:
        nearest = -(-world // layout.replica) * layout.replica
        raise ConfigError(
            f"parallel.tensor x pipeline x context is {config.tensor} x {config.pipeline} x {config.context} = "
            f"{layout.replica} ranks, and the run has {world}; start a multiple of {layout.replica} ranks, for "
            f"instance {nearest}"
        )
    return layout


def check_layout(layout: Layout, arch: Architecture) -> None:
    """Check that the model can be split this way; runs before anything is built.

    Raises:
        ConfigError: names the value, what it must divide, and which sizes would work.
    """
    tensor, pipeline = layout.tensor, layout.pipeline
    _require_divisor("parallel.tensor", tensor, _divided_by_tensor(arch))
    if layout.sequence and tensor == 1:
        raise ConfigError("parallel.sequence is true and parallel.tensor 1; allowed: parallel.tensor of 2 or more")
    if arch.layers % (pipeline * layout.virtual_stages):
        raise ConfigError(_refused_stages(pipeline, layout.virtual_stages, arch.layers))
    if layout.virtual_stages > 1 and pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_stages is {layout.virtual_stages} and parallel.pipeline 1; allowed: 1, because only "
            "pipeline ranks have virtual stages"
        )
    _check_experts(layout, arch)


def _refused_stages(pipeline: int, virtual: int, layers: int) -> str:
    """Return the error for stages that do not divide the layers, with pipeline sizes or virtual stages that do."""
    text = (
        f"parallel.pipeline x virtual_stages is {pipeline} x {virtual} = {pipeline * virtual}; it must divide "
        f"{layers} layers: "
    )
    if virtual > 1:
        fitting = fitting_sizes(lambda n: n > 1 and layers % (n * virtual) == 0, layers)
        if fitting:
            return text + f"with virtual_stages = {virtual}, parallel.pipeline may be {fitting}"
        fitting = fitting_sizes(lambda n: layers % (pipeline * n) == 0, layers)
        if fitting:
            return text + f"with pipeline = {pipeline}, parallel.virtual_stages may be {fitting}"
    fitting = fitting_sizes(lambda n: layers % n == 0, layers)
    return text + f"with virtual_stages = 1, parallel.pipeline may be {fitting}"


def check_split(layout: Layout, arch: Architecture) -> None:
    """Check that ``rlpt convert`` can split a checkpoint into ``tensor`` x ``pipeline`` x ``expert`` files.

    Raises:
        ConfigError: names the option, what it must divide, and which sizes would work.
    """
    _require_divisor("--tp", layout.tensor, _divided_by_tensor(arch))
    _require_divisor("--pp", layout.pipeline, {f"{arch.layers} layers": arch.layers})
    if arch.experts is not None:
        _require_divisor("--ep", layout.expert, {f"{arch.experts.count} experts": arch.experts.count})
    elif layout.expert > 1:
        raise ConfigError(f"--ep is {layout.expert}; allowed: 1, because {arch.model_type} models have no experts")


def _divided_by_tensor(arch: Architecture) -> dict[str, int]:
    """Return what tensor parallelism divides: description -> size."""
    amounts = {
        f"{arch.heads} attention heads": arch.heads,
        f"{arch.kv_heads} key-value heads": arch.kv_heads,
        f"{arch.padded_vocab} rows of the padded vocabulary": arch.padded_vocab,
    }
    if arch.experts is None:
        amounts[f"a feed-forward size of {arch.ffn_hidden}"] = arch.ffn_hidden
    return amounts


def _check_experts(layout: Layout, arch: Architecture) -> None:
    if arch.experts is None:
        if layout.expert > 1:
            raise ConfigError(
                f"parallel.expert is {layout.expert}; allowed: 1, because {arch.model_type} models have no experts"
            )
        return
    spread = layout.tensor * layout.context * layout.data
    _require_divisor(
        "parallel.expert",
        layout.expert,
        {
            f"{arch.experts.count} experts": arch.experts.count,
            f"{spread} tensor x context x data ranks": spread,
        },
    )
    if layout.tensor > 1 and not layout.sequence:
        raise ConfigError(
            "parallel.sequence is false; allowed: true, because Megatron trains experts under tensor parallelism only "
            "with sequence parallelism"
        )


def check_batch(layout: Layout, train: TrainConfig) -> None:
    """Check that the episodes of an update divide evenly among ranks and micro-batches.

    Raises:
        ConfigError: names the values and which micro-batch sizes would work.
    """
    together = train.micro_batch * layout.data
    if train.global_batch % together:
        fitting = fitting_sizes(
            lambda n: train.global_batch % (n * layout.data) == 0, train.global_batch // layout.data
        )
        raise ConfigError(
            f"train.micro_batch x data-parallel ranks is {train.micro_batch} x {layout.data} = {together}; it "
            f"must divide train.global_batch = {train.global_batch}: "
            + (f"train.micro_batch may be {fitting}" if fitting else f"use a multiple of {layout.data} episodes")
        )
    micro_batches = train.global_batch // together
    if layout.virtual_stages > 1 and micro_batches % layout.pipeline:
        fitting = fitting_sizes(
            lambda n: train.global_batch % (n * layout.data * layout.pipeline) == 0, train.global_batch
        )
        raise ConfigError(
            f"train.micro_batch is {train.micro_batch}, which makes {micro_batches} micro-batches per rank; the "
            f"interleaved schedule needs a multiple of parallel.pipeline = {layout.pipeline}: "
            + (
                f"train.micro_batch may be {fitting}"
                if fitting
                else f"use a train.global_batch that is a multiple of {layout.data * layout.pipeline}"
            )
        )


def _require_divisor(key: str, value: int, amounts: dict[str, int]) -> None:
    failing = [what for what, amount in amounts.items() if value < 1 or amount % value]
    if failing:
        fitting = fitting_sizes(lambda n: all(amount % n == 0 for amount in amounts.values()), min(amounts.values()))
        raise ConfigError(f"{key} is {value}; it must divide {' and '.join(failing)}: {key} may be {fitting}")


def fitting_sizes(works: Callable[[int], bool], largest: int) -> str:
    """List the sizes up to ``largest`` that work, for an error; of many the smallest."""
    return _list(n for n in range(1, min(largest, _LARGEST_OFFERED) + 1) if works(n))


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def pipeline_rank_of(rule: Rule, arch: Architecture, layout: Layout) -> int:
    """Return the pipeline rank that holds a tensor.

    Model chunks of equal size are dealt to the ranks in turn, once per virtual stage. The embedding is on the first
    rank, the final norm and the output layer on the last.
    """
    if rule.layer is None:
        return 0 if rule.megatron.startswith("embedding.") else layout.pipeline - 1
    per_chunk = arch.layers // (layout.pipeline * layout.virtual_stages)
    return rule.layer // per_chunk % layout.pipeline


def expert_rank_of(rule: Rule, arch: Architecture, layout: Layout) -> int | None:
    """Return the expert-parallel rank that holds a tensor; None if it is not an expert's."""
    if rule.expert is None:
        return None
    assert arch.experts is not None
    return rule.expert // (arch.experts.count // layout.expert)
