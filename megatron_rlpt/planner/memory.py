"""Memory of a rank in bytes, by part, at the moments of a step that need most.

Counts the tensors that Megatron-Core, its optimizer, ``policy/`` and ``rollout/`` hold at the same time. Freed memory
that an allocator keeps is not counted: torch's cache on a GPU, the holes in glibc's heap on a CPU (which
``policy/device_runtime.py`` makes it keep).

    generate             engine with its cache           policy without activations
    backward             activations, logits             engine asleep
    gradient exchange    copies of a gradient bucket (gloo only)
    weight gather        copies of a weight bucket (gloo only)
    sync                 buckets in transfer             engine awake
    checkpoint           gathered optimizer state

Sizes of parameters follow the tables of ``models/families.py`` and the sharding of ``policy/layout.py``; a test
compares them with models that Megatron has built.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, fields, replace

from megatron_rlpt.config import Config, Dtype, EngineFp8, Fp8, engine_facts, needs_engine, objective_facts
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.planner.activations import FLOAT, Pass
from megatron_rlpt.planner.update import UpdateWork
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.precision import length_multiple

_ADAM_TEMPORARIES = 2
"""Temporary tensors of the size of a parameter's shard in torch's AdamW: the root of the second moment, and its
quotient (torch/optim/adam.py: _single_tensor_adam). Transformer Engine's fused Adam has none."""
_OVERLAP_BUCKET = 40_000_000
"""Least elements of a gradient bucket with ``parallel.overlap`` (megatron/core/distributed/
distributed_data_parallel.py); without it, all gradients are one bucket."""
_PARAMETER_MULTIPLE = 64
"""Alignment of the start of each parameter in a buffer, in elements (megatron/core/distributed/
param_and_grad_buffer.py: _pad_start_of_param_if_needed)."""
_BUCKET_MULTIPLE = 128
"""Alignment of the end of a bucket, in elements, as well as its data-parallel ranks (_pad_end_of_bucket_if_needed)."""


class Device(enum.StrEnum):
    """The device of a rank, which decides kernels, optimizer and communication."""

    cpu = "cpu"
    gpu = "gpu"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at one moment; 0 for what does not exist then."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    activations: int = 0
    logits: int = 0
    exchange: int = 0
    """Copies made by communication and by the optimizer's step."""
    engine_weights: int = 0
    kv_cache: int = 0
    teacher: int = 0
    """On the leader of a replica, if the trainer judges."""
    sync_bucket: int = 0
    checkpoint: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def memory_of(
    arch: Architecture,
    layout: Layout,
    config: Config,
    device: Device = Device.gpu,
    *,
    shared_engine: bool = True,
    teacher: int = 0,
) -> Memory:
    """Return the memory of the rank that needs most, at the moment when it does.

    Args:
        arch: the model.
        layout: how it is sharded.
        config: lengths, batches, objective, precision, engine.
        device: device of the ranks.
        shared_engine: whether the engine shares the memory of the policy; false if it has its own GPU.
        teacher: bytes of the teacher on the first rank of every replica, which is in the first stage
            (``distributed/ranks.py``); it is never offloaded.
    """
    found = [
        replace(moment, teacher=0 if stage else teacher)
        for stage in range(layout.pipeline)
        for moment in moments_of(arch, layout, config, stage, device, shared_engine=shared_engine).values()
    ]
    return max(found, key=lambda memory: memory.total)


def moments_of(
    arch: Architecture,
    layout: Layout,
    config: Config,
    stage: int,
    device: Device = Device.gpu,
    *,
    shared_engine: bool = True,
) -> dict[str, Memory]:
    """Return moment -> memory of a rank of pipeline stage ``stage``; arguments as in ``memory_of``."""
    return _Rank(arch, layout, config, stage, device, shared_engine).moments()


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Return the most model chunks (layers of a virtual stage) whose activations a rank holds at the same time.

    ``megatron/core/pipeline_parallel/schedules.py: get_pp_rank_microbatches``, plus the chunk being computed.
    """
    behind = layout.pipeline - stage - 1
    if layout.virtual_stages == 1:
        return min(behind + 1, micro_batches)
    warm_up = 2 * behind + (layout.virtual_stages - 1) * layout.pipeline
    return min(warm_up + 1, micro_batches * layout.virtual_stages)


@dataclass(frozen=True)
class _Rank:
    arch: Architecture
    layout: Layout
    config: Config
    stage: int
    device: Device
    shared_engine: bool

    def moments(self) -> dict[str, Memory]:
        resident = self._resident()
        awake, asleep = self._engine(), Memory()
        engine = engine_facts(self.config)
        if self.device is Device.cpu or not engine.sleeps:
            asleep = replace(awake, kv_cache=awake.kv_cache if engine.keeps_cache else 0)
        offloaded = self.config.optimizer.offload and self.device is Device.gpu
        idle = replace(resident, optimizer=0, gradients=0) if offloaded else resident
        training = _together(resident, asleep)
        found = {
            "backward": _together(training, self._backward()),
            "gradient exchange": replace(training, exchange=self._exchange(FLOAT)),
            "optimizer step": replace(training, exchange=self._optimizer_step()),
            "weight gather": replace(training, exchange=self._exchange(self._width)),
            "checkpoint": replace(training, checkpoint=self._checkpoint()),
        }
        if resident.reference == 0 and self._has_reference:
            # On a GPU the reference is onloaded from host memory for one forward pass.
            found["reference pass"] = replace(training, reference=self._width * self._shard.elements)
        if needs_engine(self.config):
            found["generate"] = _together(idle, awake)
            found["sync"] = replace(_together(idle, awake), kv_cache=0, sync_bucket=self._sync())
        return found

    @property
    def _shard(self) -> Shard:
        return shard_of(self.arch, self.layout, self.stage)

    @property
    def _width(self) -> int:
        return FLOAT if self.config.model.dtype is Dtype.fp32 else 2

    @property
    def _has_reference(self) -> bool:
        return objective_facts(self.config).needs_reference

    @property
    def _fused(self) -> bool:
        return self.device is Device.gpu

    def _resident(self) -> Memory:
        """Return what always exists. During an update FP8 copies of the weights are cached, plain and transposed."""
        shard = self._shard
        fp8 = 0
        if self.config.model.fp8 is not Fp8.off:
            fp8 = 2 * (shard.elements - (shard.embedding_rows + shard.output_rows) * self.arch.hidden)
        # Adam's moments, and main weights if the weights are not fp32.
        state = 2 * FLOAT + (FLOAT if self._width < FLOAT else 0)
        return Memory(
            weights=self._width * shard.padded + fp8,
            gradients=FLOAT * shard.padded,
            optimizer=state * shard.share,
            reference=self._width * shard.elements if self._has_reference and self.device is Device.cpu else 0,
        )

    def _pass(self) -> Pass:
        config, layout = self.config, self.layout
        work, multiple = UpdateWork.of(config, layout), length_multiple(layout, config.model.fp8)
        # A micro-batch is one pack, or a row per completion under context parallelism.
        rows, length = 1, work.micro_batch * work.tokens
        if not work.shared:
            rows, length = work.micro_batch * work.completions, work.length
        return Pass(
            self.arch,
            layout,
            rows,
            -(-length // multiple) * multiple // layout.context,
            # Under context parallelism one rank has the whole end of a sequence.
            work.micro_batch * work.completions * work.predicted,
            self._width,
            self._fused,
            config.model.fp8 is not Fp8.off,
            config.train.recompute,
        )

    def _backward(self) -> Memory:
        """Return the activations of all micro-batches in flight, and the largest of the backward passes of the
        vocabulary projection, of a layer and of the embedding."""
        one, shard, layout = self._pass(), self._shard, self.layout
        micro_batches = max(1, self.config.train.global_batch // (self.config.train.micro_batch * layout.data))
        chunks = in_flight(layout, self.stage, micro_batches)
        per_chunk = self.arch.layers // (layout.pipeline * layout.virtual_stages)
        kept = chunks * one.kept(per_chunk)
        if layout.pipeline > 1:
            # Received and sent tensors stay until the micro-batch's backward pass; norms that keep their input in its
            # own precision keep the received tensor itself.
            kept += chunks * one.stream * (1 if self._fused or self._width == FLOAT else 2)
        matrix = self._width * max(shard.output_rows, shard.embedding_rows) * self.arch.hidden
        if shard.output_rows:
            head = one.head(shard.output_rows, self.config.train.logprob_chunk)
            found = [Memory(activations=kept + one.final_norm(), logits=head)]
            # The gradient of a tied projection waits for the embedding's.
            waiting = matrix if self.arch.tied_embeddings and shard.embedding_rows else 0
        else:
            found, waiting = [], 0
        found.append(Memory(activations=kept + one.working(), logits=waiting))
        if shard.embedding_rows:
            found.append(Memory(activations=(chunks - 1) * one.kept(per_chunk), logits=matrix + 2 * waiting))
        return max(found, key=lambda memory: memory.total)

    def _exchange(self, width: int) -> int:
        """Return one copy of the largest exchange. gloo copies it, even on a single rank; NCCL works in place."""
        if self.device is Device.gpu:
            return 0
        sizes = [buffer.padded for buffer in self._shard.buffers]
        if self.config.parallel.overlap and self.stage == 0:
            ranks = self.layout.data * self.layout.context
            sizes = [min(size, max(_OVERLAP_BUCKET, 1_000_000 * ranks)) for size in sizes]
        return width * max(sizes)

    def _optimizer_step(self) -> int:
        if self.device is Device.gpu:
            return 0
        shares = [min(max(buffer.tensors), buffer.share) for buffer in self._shard.buffers]
        return _ADAM_TEMPORARIES * FLOAT * max(shares)

    def _checkpoint(self) -> int:
        """Return the bytes for gathering main weights and moments, one after the other (megatron/core/optimizer/
        distrib_optimizer.py: get_parameter_state_dp_zero). On a GPU that is one gathered tensor, which moves to host
        memory; on a CPU also the three results, this rank's shards of them, and two more copies of the gathered tensor:
        concatenated, and gloo's."""
        found = []
        for buffer in self._shard.buffers:
            gathered = FLOAT * buffer.padded
            if self.device is Device.gpu:
                found.append(gathered + FLOAT * buffer.share)
            else:
                found.append(3 * FLOAT * (buffer.padded + buffer.share) + 3 * gathered)
        return max(found) if self.device is Device.gpu else sum(found)

    def _engine(self) -> Memory:
        """Return the engine's weights and cache on this GPU."""
        if not needs_engine(self.config) or not self.shared_engine:
            return Memory()
        tensor = self.layout.tensor if engine_facts(self.config).cut_over_tensor else self.config.rollout.tensor
        elements = model_elements(self.arch) // tensor
        if self.config.rollout.fp8 is not EngineFp8.off:
            elements //= self._width  # one byte each
        return Memory(engine_weights=self._width * elements, kv_cache=int(self.config.rollout.kv_cache_gib * 2**30))

    def _sync(self) -> int:
        """Return a bucket of whole tensors, this rank's shards of it and of the next, and one tensor being assembled
        (``policy/weights.py``); only that tensor if every rank holds whole tensors."""
        largest = self._width * self.arch.padded_vocab * self.arch.hidden
        layout = self.layout
        if layout.tensor == layout.pipeline == layout.expert == 1:
            return largest
        bucket = max(self.config.rollout.sync_bucket_mib << 20, largest)
        shards = bucket // layout.tensor
        return bucket + (2 * shards if layout.tensor > 1 else shards) + largest


def _together(one: Memory, other: Memory) -> Memory:
    return Memory(**{part.name: getattr(one, part.name) + getattr(other, part.name) for part in fields(Memory)})


@dataclass(frozen=True)
class Buffer:
    """Parameters in one contiguous buffer, reduced over the same ranks."""

    tensors: tuple[int, ...]
    """Elements of each."""
    ranks: int
    """Ranks that hold the same parameters and shard the optimizer's state."""

    @property
    def elements(self) -> int:
        """Number of parameters, without padding."""
        return sum(self.tensors)

    @property
    def padded(self) -> int:
        """Elements with padding."""
        multiple = math.lcm(self.ranks, _BUCKET_MULTIPLE)
        return _up(sum(_up(size, _PARAMETER_MULTIPLE) for size in self.tensors), multiple)

    @property
    def share(self) -> int:
        """Elements whose optimizer state one rank holds."""
        return self.padded // self.ranks


@dataclass(frozen=True)
class Shard:
    """The shard of a model on a rank of one pipeline stage."""

    dense: Buffer
    experts: Buffer
    """Empty if experts are reduced together with the rest."""
    output_rows: int
    """Rows of the vocabulary projection; 0 except on the last stage."""
    embedding_rows: int
    """Rows of the input embedding; 0 except on the first stage."""

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Buffers that are not empty."""
        return tuple(buffer for buffer in (self.dense, self.experts) if buffer.tensors)

    @property
    def elements(self) -> int:
        """Number of parameters, without padding."""
        return sum(buffer.elements for buffer in self.buffers)

    @property
    def padded(self) -> int:
        """Elements with padding."""
        return sum(buffer.padded for buffer in self.buffers)

    @property
    def share(self) -> int:
        """Elements whose optimizer state one rank holds."""
        return sum(buffer.share for buffer in self.buffers)


def shard_of(arch: Architecture, layout: Layout, stage: int) -> Shard:
    """Return the shard of a rank of pipeline stage ``stage``."""
    layers = arch.layers // layout.pipeline
    first, last = stage == 0, stage == layout.pipeline - 1
    rows = arch.padded_vocab // layout.tensor
    # A tied output layer is the embedding itself, unless the two are on different stages.
    own_output = last and not (arch.tied_embeddings and first)
    dense = layers * _layer(arch, layout)
    dense += [rows * arch.hidden] * (first + own_output) + [arch.hidden] * last
    experts = layers * _local_experts(arch, layout)
    # Then reduced over other ranks than the rest, in a separate buffer (policy/model.py: build_model).
    apart = layout.expert > 1 or layout.tensor > 1
    copies = layout.data * layout.context
    return Shard(
        Buffer(tuple(dense + ([] if apart else experts)), copies),
        Buffer(tuple(experts) if apart else (), layout.world // (layout.pipeline * layout.expert)),
        rows if last else 0,
        rows if first else 0,
    )


def model_elements(arch: Architecture) -> int:
    """Return the parameters of the whole model, without padding of its vocabulary."""
    padding = arch.padded_vocab - arch.vocab
    return shard_of(arch, Layout(), 0).elements - padding * arch.hidden * (1 if arch.tied_embeddings else 2)


def _layer(arch: Architecture, layout: Layout) -> list[int]:
    """Return the sizes of the tensors of one layer, without experts."""
    hidden, tensor = arch.hidden, layout.tensor
    qkv = (arch.heads + 2 * arch.kv_heads) * arch.head_dim // tensor
    tensors = [hidden, qkv * hidden, hidden * arch.heads * arch.head_dim // tensor, hidden]
    tensors += [qkv] * arch.qkv_bias + [arch.head_dim] * 2 * arch.qk_norm
    if arch.experts is not None:
        return [*tensors, arch.experts.count * hidden]
    return [*tensors, 2 * hidden * arch.ffn_hidden // tensor, hidden * arch.ffn_hidden // tensor]


def _local_experts(arch: Architecture, layout: Layout) -> list[int]:
    """Return the sizes of the tensors of one layer's experts on this rank; tensor parallelism does not split them."""
    if arch.experts is None:
        return []
    inner = arch.hidden * arch.experts.ffn_hidden
    return [2 * inner, inner] * (arch.experts.count // layout.expert)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
