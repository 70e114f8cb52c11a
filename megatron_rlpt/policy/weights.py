"""Weights in Hugging Face names and shapes: loaded into the model and streamed out of it, in any layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import EMBEDDING, OUTPUT, Rule, Shape, expected_shapes, mapping
from megatron_rlpt.models.huggingface import WeightFolder, checked
from megatron_rlpt.models.sharding import shard, unshard
from megatron_rlpt.policy.layers import canonical_name
from megatron_rlpt.policy.layout import Layout, expert_rank_of, pipeline_rank_of
from megatron_rlpt.policy.model import HiddenStateModel

_LAYER_NUMBER = re.compile(r"(?<=decoder\.layers\.)\d+")
_EXPERT_NUMBER = re.compile(r"(?<=local_experts\.)\d+")


def named_parameters(
    model_chunks: Sequence[HiddenStateModel], arch: Architecture, layout: Layout
) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters by ``Rule.megatron``: layers and experts are numbered over the whole model."""
    experts = arch.experts.count // layout.expert if arch.experts else 0
    first_expert = experts * (parallel_state.get_expert_model_parallel_rank() if arch.experts else 0)
    found = {}
    for model_chunk in model_chunks:
        first_layer = model_chunk.decoder.layers[0].layer_number - 1  # Megatron counts them from 1
        for name, parameter in model_chunk.named_parameters():
            name = _renumbered(_LAYER_NUMBER, canonical_name(name), first_layer)
            found[_renumbered(_EXPERT_NUMBER, name, first_expert)] = parameter
    return found


def _renumbered(pattern: re.Pattern[str], name: str, first: int) -> str:
    return pattern.sub(lambda number: str(int(number[0]) + first), name)


def load_weights(model_chunks: Sequence[HiddenStateModel], arch: Architecture, layout: Layout, folder: Path) -> None:
    """Load this rank's shards from a Hugging Face folder, with one layer's tensors in memory at a time.

    Raises:
        ModelError: a tensor is missing or duplicated, has another shape than the configuration, or is not finite; or
            the folder has a separate output layer although embeddings are tied.
    """
    source = WeightFolder(folder)
    source.check_head(arch)
    parameters = named_parameters(model_chunks, arch, layout)
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for rule in mapping(arch):
            targets = [parameters.pop(rule.megatron)] if rule.megatron in parameters else []
            if rule.megatron == EMBEDDING and arch.tied_embeddings and OUTPUT in parameters:
                targets.append(parameters.pop(OUTPUT))  # the last stage's copy of the tied embedding
            if targets:
                whole = rule.merge(arch, checked(folder, arch, rule, [source.read(name) for name in rule.hf]))
                for parameter in targets:
                    parameter.copy_(shard(whole, rule.sharding, rank, layout.tensor))
    assert not parameters, f"no mapping for {sorted(parameters)}"


class WeightSource:
    """The policy's weights as a stream of whole Hugging Face tensors, the same on every rank, from any layout.

    Iterating yields (Hugging Face name, tensor) of every weight in a fixed order; tensors may share memory with the
    model. It is a collective: every rank must iterate to the end. The Megatron engine reads ``model_chunks`` instead.

    Weights are exchanged in buckets. The pipeline stage that holds a bucket broadcasts each tensor-parallel rank's
    shard along the pipeline, which is often the slower link, and then every tensor-parallel group gathers the shards
    (for experts: the expert rank that holds them broadcasts them). A bucket is on its way along the pipeline while the
    one before is used. Besides its share of the model, a rank holds at most one bucket, its own shards of two, and the
    copies of one unsharded tensor.
    """

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateModel],
        arch: Architecture,
        layout: Layout,
        ranks: Ranks,
        bucket_bytes: int,
    ) -> None:
        """Plan the stream over ``model_chunks``.

        Args:
            model_chunks: this rank's model chunks.
            arch: the architecture.
            layout: the training layout.
            ranks: all ranks, for barriers with a timeout.
            bucket_bytes: memory for one bucket on every rank; a single larger tensor is its own bucket.
        """
        self.model_chunks = model_chunks
        """This rank's model chunks, one per virtual stage."""
        self._parameters = named_parameters(model_chunks, arch, layout)
        self._arch = arch
        self._layout = layout
        self._ranks = ranks
        self._buckets = plan_buckets(arch, layout, bucket_bytes, next(iter(self._parameters.values())).element_size())
        self.received = LinkBytes()
        """What the last iteration brought to this rank."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor, in the order of the stream."""
        return expected_shapes(self._arch)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every weight.

        Raises:
            TrainingError: a rank did not arrive in time; names it.
        """
        self._ranks.barrier("the exchange of weights")
        self.received = LinkBytes()
        begun = self._begin(self._buckets[0])
        for number, bucket in enumerate(self._buckets):
            arriving = begun
            if number + 1 < len(self._buckets):
                begun = self._begin(self._buckets[number + 1])
            yield from self._tensors(bucket, self._finish(bucket, arriving))

    def _tensors(self, bucket: GatherBucket, gathered: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the Hugging Face tensors of ``bucket`` from the flattened shards of all tensor-parallel ranks."""
        offset = 0
        for rule in bucket.rules:
            shape = bucket.shapes[rule.megatron]
            size = torch.Size(shape).numel()
            parts = [part[offset : offset + size].view(shape) for part in gathered]
            offset += size
            yield from zip(rule.hf, rule.split(self._arch, unshard(parts, rule.sharding)), strict=True)

    def _begin(self, bucket: GatherBucket) -> _Arriving:
        """Send or receive this rank's shard of ``bucket`` along the pipeline, without waiting for it."""
        layout = self._layout
        stage = parallel_state.get_pipeline_model_parallel_rank()
        on_owner = bucket.expert_rank in (None, parallel_state.get_expert_model_parallel_rank())
        owner = stage == bucket.stage and on_owner
        for rule in bucket.rules:
            assert owner == (rule.megatron in self._parameters), f"{rule.megatron} is not on the planned rank"
        some = next(iter(self._parameters.values()))
        if owner:
            own = [self._parameters[rule.megatron].detach().reshape(-1) for rule in bucket.rules]
            flat = own[0] if len(own) == 1 else torch.cat(own)
        else:
            flat = some.new_empty(bucket.numel)
        work = None
        if layout.pipeline > 1 and on_owner:
            group = parallel_state.get_pipeline_model_parallel_group()
            work = torch.distributed.broadcast(_bytes(flat), group=group, group_src=bucket.stage, async_op=True)
            if not owner:
                self.received.pipeline += flat.nbytes
        return _Arriving(flat, work)

    def _finish(self, bucket: GatherBucket, arriving: _Arriving) -> list[torch.Tensor]:
        """Return the flattened shards of ``bucket``, one per tensor-parallel rank (experts: one)."""
        if arriving.work is not None:
            arriving.work.wait()
        flat = arriving.flat
        if bucket.expert_rank is not None:
            if self._layout.expert > 1:
                group = parallel_state.get_expert_model_parallel_group()
                torch.distributed.broadcast(_bytes(flat), group=group, group_src=bucket.expert_rank)
                if bucket.expert_rank != parallel_state.get_expert_model_parallel_rank():
                    self.received.expert += flat.nbytes
            return [flat]
        if (parts := self._layout.tensor) == 1:
            return [flat]
        whole = flat.new_empty(parts * bucket.numel)
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather_into_tensor(_bytes(whole), _bytes(flat), group=group)
        self.received.tensor += whole.nbytes - flat.nbytes
        return list(whole.view(parts, bucket.numel))


@dataclass
class LinkBytes:
    """Bytes that a rank received over each kind of process group."""

    tensor: int = 0
    pipeline: int = 0
    expert: int = 0

    def metrics(self) -> dict[str, float]:
        """Return MiB by the kind of group, as ``sync/...``; only of those that brought anything."""
        return {f"sync/{name}_mib": count / 2**20 for name, count in vars(self).items() if count}


@dataclass(frozen=True)
class _Arriving:
    """This rank's flattened shard of a bucket, which is complete once ``work`` is done."""

    flat: torch.Tensor
    work: torch.distributed.Work | None


@dataclass(frozen=True)
class GatherBucket:
    """Consecutive rules whose tensors are on the same ranks and are exchanged together."""

    stage: int
    """Pipeline rank that holds them."""
    expert_rank: int | None
    """Expert-parallel rank that holds them; None for tensors that are not experts'."""
    rules: list[Rule] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    """``Rule.megatron`` -> shape of one rank's shard."""

    @property
    def numel(self) -> int:
        """Number of elements of one rank's shards."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def plan_buckets(arch: Architecture, layout: Layout, bucket_bytes: int, element_size: int) -> list[GatherBucket]:
    """Group the rules of ``arch``, in order, into buckets of at most ``bucket_bytes`` once gathered.

    If every rank holds every tensor whole, each rule is its own bucket, which avoids copies.
    """
    spread = layout.tensor > 1 or layout.pipeline > 1 or layout.expert > 1
    buckets: list[GatherBucket] = []
    filled = 0
    for rule in mapping(arch):
        location = pipeline_rank_of(rule, arch, layout), expert_rank_of(rule, arch, layout)
        shape = _shard_shape(rule, arch, layout)
        gathered = torch.Size(shape).numel() * element_size * (1 if rule.expert is not None else layout.tensor)
        last = buckets[-1] if buckets else None
        if last is None or not spread or (last.stage, last.expert_rank) != location or filled + gathered > bucket_bytes:
            buckets.append(GatherBucket(*location))
            filled = 0
        buckets[-1].rules.append(rule)
        buckets[-1].shapes[rule.megatron] = shape
        filled += gathered
    return buckets


def _shard_shape(rule: Rule, arch: Architecture, layout: Layout) -> Shape:
    return tuple(shard(torch.empty(rule.shape(arch), device="meta"), rule.sharding, 0, layout.tensor).shape)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View the tensor as bytes, because backends do not support every dtype."""
    return tensor.contiguous().view(torch.uint8)
