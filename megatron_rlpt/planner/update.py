"""The seconds of a forward pass or an optimizer update in a layout, part by part.

A pipeline stage processes its micro-batches one by one; each layer takes the time of its matrix products, attention,
kernels that only move memory, and communication between its ranks. The slowest stage sets the pace: the last one, with
the output layer. Data-parallel ranks exchange gradients and weights; the part that the passes cannot hide is added.
``tools/bench/plan_megatron_table.py`` compares this with published measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_rlpt.config import Config, Recompute, rows_per_example
from megatron_rlpt.planner.hardware import Constant, Nodes, attention_seconds, linear_seconds, memory_seconds
from megatron_rlpt.planner.transformer import Transformer
from megatron_rlpt.policy.layout import Layout

STEP_OVERHEAD = Constant(
    0.080,
    "fitted, with hardware.MATMUL_EFFICIENCY, to the 16 points of the public Megatron-LM H100 table "
    "(tools/bench/plan_megatron_table.py --fit): data loading, logging, gradient norm, waiting for the slowest rank",
)
"""Seconds per optimizer step that depend on neither model nor batch."""
ELEMENTWISE_FORWARD = Constant(
    28, "counted: bytes per token and hidden element that two norms, two residual additions and RoPE move in bf16"
)
"""Without the activation of the feed-forward layer."""
ELEMENTWISE_BACKWARD = Constant(36, "counted: the same kernels in the backward pass, which read inputs and gradients")
LOGIT_BYTES = Constant(
    12, "counted: bytes per token and vocabulary entry of log-softmax and its gradient: fp32 once, bf16 four times"
)
_GRADIENT_BYTES, _WEIGHT_BYTES = 4, 2
_STATE_BYTES = 32
"""Bytes that the optimizer reads and writes per parameter: fp32 gradient, weight and two moments, bf16 weight."""


@dataclass(frozen=True)
class UpdateWork:
    """The batch of one update."""

    examples: int
    """Examples of the whole batch."""
    length: int
    """Tokens of a prefix with one completion."""
    predicted: int
    """Tokens of a completion, whose logits are computed."""
    micro_batch: int
    """Examples of a micro-batch per rank."""
    completions: int = 1
    """Completions of an example."""
    shared: bool = True
    """Whether the completions of an example share its prefix."""

    @classmethod
    def of(cls, config: Config, layout: Layout) -> UpdateWork:
        """Return the batch of an update of ``config``, with every prefix ``data.max_prefix`` long."""
        train = config.train
        return cls(
            train.global_batch,
            config.max_sequence,
            config.data.suffix_length,
            train.micro_batch,
            completions=rows_per_example(config),
            shared=layout.context == 1,
        )

    @property
    def prefix(self) -> int:
        """Tokens of a prefix."""
        return self.length - self.predicted

    @property
    def tokens(self) -> int:
        """Tokens computed per example."""
        if self.shared:
            return self.prefix + self.completions * self.predicted
        return self.completions * self.length

    @property
    def pairs(self) -> int:
        """Pairs of query and key per example, twice as many as causal attention computes."""
        if self.shared:
            return self.prefix**2 + self.completions * (2 * self.prefix + self.predicted) * self.predicted
        return self.completions * self.length**2


@dataclass(frozen=True)
class Options:
    """Settings of a run that change the duration of its passes."""

    fp8: bool = False
    recompute: Recompute = Recompute.none
    hidden_tensor: float = 0.0
    """Share of tensor-parallel communication that is hidden behind computation."""
    overlap_reduce: bool = False
    overlap_gather: bool = False
    overhead: float = STEP_OVERHEAD
    """Seconds per update that depend on neither model nor batch."""


@dataclass(frozen=True)
class Parts:
    """Seconds of one layer or several, by part."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def plus(self, other: Parts, times: float = 1.0) -> Parts:
        """Return the sum of this and ``times`` the other."""
        return Parts(*(getattr(self, p.name) + times * getattr(other, p.name) for p in fields(self)))


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass over the whole batch on the slowest rank."""

    layers: Parts
    logits: float
    pipeline: float
    """Transfer of activations and gradients between stages."""
    bubble: float
    """Idle time while the pipeline fills and empties."""
    data: float = 0.0
    """Exchange of gradients and weights between data-parallel ranks, as far as it is not hidden."""
    optimizer: float = 0.0
    overhead: float = 0.0
    """``Options.overhead``."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        own = (part.name for part in fields(self) if part.name != "layers")
        return self.layers.total + sum(getattr(self, name) for name in own)

    def parts(self) -> dict[str, float]:
        """Return name -> seconds, with the parts of the layers."""
        flat = {part.name: getattr(self.layers, part.name) for part in fields(self.layers)}
        return flat | {part.name: getattr(self, part.name) for part in fields(self) if part.name != "layers"}


def forward_seconds(model: Transformer, layout: Layout, nodes: Nodes, work: UpdateWork, options: Options) -> PassTime:
    """Return the time of a forward pass without gradients, as for the log-probabilities of the reference."""
    stage = _Stage.of(model, layout, nodes, work, options)
    micro_batches = _micro_batches(layout, work)
    sends = layout.virtual_stages * stage.send
    return PassTime(
        layers=Parts().plus(stage.forward, micro_batches * stage.layers),
        logits=micro_batches * stage.logits[0],
        pipeline=micro_batches * sends,
        # Megatron's schedules fill the pipeline once, also for forward-only passes.
        bubble=(layout.pipeline - 1) / layout.virtual_stages * (stage.layers * stage.forward.total + sends),
    )


def update_seconds(model: Transformer, layout: Layout, nodes: Nodes, work: UpdateWork, options: Options) -> PassTime:
    """Return the time of forward-backward, gradient exchange, optimizer step and weight exchange."""
    stage = _Stage.of(model, layout, nodes, work, options)
    micro_batches = _micro_batches(layout, work)
    both = stage.forward.plus(stage.backward)
    sends = 2 * layout.virtual_stages * stage.send
    mean = stage.layers * both.total + sends + sum(stage.logits) / layout.pipeline
    return PassTime(
        layers=Parts().plus(both, micro_batches * stage.layers),
        logits=micro_batches * sum(stage.logits),
        pipeline=micro_batches * sends,
        bubble=(layout.pipeline - 1) / layout.virtual_stages * mean,
        data=_data_seconds(model, layout, nodes, stage, micro_batches, options),
        optimizer=_optimizer_seconds(model, layout, nodes),
        overhead=options.overhead,
    )


def utilisation(model: Transformer, nodes: Nodes, work: UpdateWork, seconds: float, *, passes: float = 3.0) -> float:
    """Return the MFU: model FLOPs (Megatron's count) over the bf16 peak of all GPUs; ``passes`` is 3 with backward."""
    predicted = work.completions * work.predicted
    flops = passes * work.examples * model.forward_flops(work.tokens, predicted, work.pairs)
    return flops / (seconds * nodes.gpus * nodes.gpu.bf16)


@dataclass(frozen=True)
class _Stage:
    """The time of one micro-batch on one stage."""

    layers: int
    forward: Parts
    """Of one layer."""
    backward: Parts
    """Of one layer, with recomputation."""
    logits: tuple[float, float]
    """Forward and backward of the output layer, on the last stage."""
    send: float
    """One transfer to the next stage."""

    @classmethod
    def of(cls, model: Transformer, layout: Layout, nodes: Nodes, work: UpdateWork, options: Options) -> _Stage:
        tokens = work.micro_batch * work.tokens / layout.context
        forward, backward, feed_forward = _layer(model, layout, nodes, work, options, tokens)
        again = {
            Recompute.full: forward,
            Recompute.selective: Parts(attention=forward.attention),
            Recompute.mlp: feed_forward,
        }
        backward = backward.plus(again.get(options.recompute, Parts()))
        rows = work.micro_batch * work.completions * work.predicted / layout.context
        ahead, back = linear_seconds(nodes.gpu, rows, model.vocab / layout.tensor, model.hidden)
        softmax = memory_seconds(nodes.gpu, LOGIT_BYTES * rows * model.vocab / layout.tensor)
        send = 0.0
        if layout.pipeline > 1:
            split = layout.tensor if layout.sequence else 1
            speed = nodes.bandwidth(layout.pipeline, layout.tensor * layout.context * layout.data)
            send = tokens * model.hidden * 2 / split / speed
        return cls(
            model.layers // layout.pipeline, forward, backward, (ahead + softmax / 3, back + softmax * 2 / 3), send
        )


def _micro_batches(layout: Layout, work: UpdateWork) -> int:
    """Return the micro-batches per rank; an interleaved pipeline needs a multiple of its size."""
    micro_batches = math.ceil(work.examples / (layout.data * work.micro_batch))
    return math.ceil(micro_batches / layout.pipeline) * layout.pipeline if layout.virtual_stages > 1 else micro_batches


def _layer(
    model: Transformer, layout: Layout, nodes: Nodes, work: UpdateWork, options: Options, tokens: float
) -> tuple[Parts, Parts, Parts]:
    """Return the forward and backward time of one layer on a rank's ``tokens`` tokens, and that of the forward pass of
    its feed-forward part."""
    gpu, tensor = nodes.gpu, layout.tensor
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    products = [(1, tokens, (query + 2 * key) / tensor, model.hidden), (1, tokens, model.hidden, query / tensor)]
    spread = tensor if layout.sequence else 1
    inner = model.ffn_hidden / tensor
    exchange = 0.0
    if model.experts is None:
        products += [(1, tokens, model.projections * inner, model.hidden), (1, tokens, model.hidden, inner)]
    else:
        # Tensor parallelism does not split experts: each rank sends its own share of the tokens there and back.
        held = model.experts.count // layout.expert
        routed = tokens / spread * model.experts.per_token
        each, inner = routed / held, model.experts.ffn_hidden
        products += [(held, each, model.projections * inner, model.hidden), (held, each, model.hidden, inner)]
        inner *= routed / tokens
        exchange = 2 * nodes.exchange_seconds(routed * model.hidden * 2, layout.expert)
    pairs = [(count, linear_seconds(gpu, *size, fp8=options.fp8)) for count, *size in products]
    attention = attention_seconds(
        gpu, work.micro_batch, math.sqrt(work.pairs / layout.context), query / tensor
    )  # a rank's share of the causal triangle is 1 / context of it
    collective = tokens * model.hidden * 2 * (tensor - 1) / tensor / nodes.bandwidth(tensor)
    tensors = 4 * collective * (1 - options.hidden_tensor)
    ring = _ring_seconds(model, layout, nodes, tokens)
    parts = []
    for index, elementwise in enumerate((ELEMENTWISE_FORWARD, ELEMENTWISE_BACKWARD)):
        activation = 2 * (model.projections + 1) if index == 0 else 2 * (2 * model.projections + 1)
        moved = tokens * (elementwise * model.hidden / spread + activation * inner)
        parts.append(
            Parts(
                matmul=sum(count * pair[index] for count, pair in pairs),
                attention=attention[index],
                elementwise=memory_seconds(gpu, moved),
                tensor=tensors,
                # Attention on keys and values already received hides the transfer of the others.
                context=max(0.0, (index + 1) * ring - attention[index]),
                expert=exchange,
            )
        )
    # The third and fourth product; with experts the exchange is repeated as well.
    feed_forward = Parts(
        matmul=sum(count * pair[0] for count, pair in pairs[2:]),
        elementwise=memory_seconds(gpu, tokens * 2 * (model.projections + 1) * inner),
        tensor=tensors / 2,
        expert=exchange,
    )
    return parts[0], parts[1], feed_forward


def _ring_seconds(model: Transformer, layout: Layout, nodes: Nodes, tokens: float) -> float:
    """Return the seconds to pass a layer's keys and values once around the context-parallel ranks."""
    if layout.context == 1:
        return 0.0
    moved = tokens * 2 * model.kv_heads * model.head_dim * 2 / layout.tensor * (layout.context - 1)
    return moved / nodes.bandwidth(layout.context, layout.tensor)


def shares(model: Transformer, layout: Layout) -> tuple[float, float]:
    """Return the parameters per rank of the fullest stage: dense ones and those of experts."""
    layers = model.layers // layout.pipeline
    dense = model.attention_parameters + (0 if model.experts else model.expert_parameters)
    ends = model.embedding_parameters * (2 if layout.pipeline == 1 and not model.tied else 1)
    experts = model.experts.count // layout.expert * model.expert_parameters if model.experts else 0
    return (layers * dense + ends) / layout.tensor, float(layers * experts)


def _data_seconds(
    model: Transformer, layout: Layout, nodes: Nodes, stage: _Stage, micro_batches: int, options: Options
) -> float:
    """Return the seconds to reduce gradients and gather weights that the adjacent passes do not hide.

    A stage of an interleaved pipeline finishes a model chunk after the last ``pipeline`` micro-batches, which hide its
    exchange; nothing hides that of the last chunk.
    """
    dense, experts = shares(model, layout)
    seconds = 0.0
    for parameters, size, stride in (
        (dense, layout.data * layout.context, layout.tensor),
        (experts, layout.world // (layout.pipeline * layout.expert), layout.expert),
    ):
        if size > 1:
            seconds += parameters * (size - 1) / size / nodes.bandwidth(size, stride)
    passes = min(layout.pipeline, micro_batches) * (stage.layers - 1)
    hidden_reduce = passes * stage.backward.total if options.overlap_reduce else 0.0
    hidden_gather = passes * stage.forward.total if options.overlap_gather else 0.0
    return max(0.0, _GRADIENT_BYTES * seconds - hidden_reduce) + max(0.0, _WEIGHT_BYTES * seconds - hidden_gather)


def _optimizer_seconds(model: Transformer, layout: Layout, nodes: Nodes) -> float:
    """Return the seconds of Adam on a rank's share; Megatron's distributed optimizer shards the state over replicas."""
    dense, experts = shares(model, layout)
    copies = layout.world // (layout.pipeline * layout.expert)
    return memory_seconds(nodes.gpu, _STATE_BYTES * (dense / (layout.data * layout.context) + experts / copies))
