"""The policy as the training loop uses it: update, weights, save, load."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_rlpt.config import Config, Dtype, Fp8
from megatron_rlpt.errors import TrainingError
from megatron_rlpt.models.architecture import Architecture, read_architecture
from megatron_rlpt.models.families import Shape
from megatron_rlpt.objectives import Example, LossInputs, LossTerms, Objective
from megatron_rlpt.observe.machine import bf16_is_slow
from megatron_rlpt.policy import precision
from megatron_rlpt.policy.batching import (
    Batch,
    BatchShape,
    ContextShare,
    MicroBatchPlan,
    make_batch,
    plan_micro_batches,
    shape_of,
)
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.forward_backward import ForwardBackward
from megatron_rlpt.policy.fusions import find_fusions
from megatron_rlpt.policy.layers import describe_layers
from megatron_rlpt.policy.layout import Layout, layout_of
from megatron_rlpt.policy.model import build_model
from megatron_rlpt.policy.offload import OptimizerOffload
from megatron_rlpt.policy.optimizer import build_optimizer, build_scheduler, parts_with_parameters
from megatron_rlpt.policy.precision import length_multiple
from megatron_rlpt.policy.reference import ReferenceWeights
from megatron_rlpt.policy.requirements import check_model
from megatron_rlpt.policy.routing import Routers
from megatron_rlpt.policy.sharded_checkpoint import ShardedWriting
from megatron_rlpt.policy.start_check import StartCheck, probe_tokens, recording
from megatron_rlpt.policy.state import PolicyState
from megatron_rlpt.policy.weights import WeightSource, load_weights
from megatron_rlpt.types import Candidate, Episode, Source

_log = logging.getLogger(__name__)

_UPDATES_PER_RETURN = 16
"""Updates after which freed memory of a CPU is returned: seldom, because fetching it again takes part of a second."""
_COMPARED = ("logprob_gap", "engine_ratio", "engine_ratio_above_2")
"""Metrics that compare the policy's log-probability of a token with the engine's."""


def check_policy(config: Config, world: int) -> tuple[Architecture, Layout]:
    """Check that ``world`` ranks can train the model of ``config``; builds nothing.

    Raises:
        ModelError: the folder cannot be used, or its context is shorter than a training sequence.
        ConfigError: the model cannot be split over the ranks like that, or the precision is not supported here.
    """
    folder = Path(config.model.path)
    arch = read_architecture(folder)
    layout = layout_of(config.parallel, world)
    check_model(config, arch, layout, folder)
    precision.require(config.model.fp8, config.model.dtype)
    return arch, layout


class Policy:
    """A Megatron model with its optimizer, learning-rate schedule and reference weights, in a training layout.

    Its methods are collectives: every rank calls them with the same arguments.

    Attributes:
        arch: the architecture, as read from the starting model.
        layout: how it is split over ranks.
        version: number of optimizer updates so far.
        packed: whether the completions of an example share its prefix; not under context parallelism.
    """

    def __init__(self, config: Config, objective: Objective, runtime: DeviceRuntime) -> None:
        """Load the starting model of ``config.model.path``; raises as ``check_policy``."""
        self.arch, self.layout = check_policy(config, runtime.world)
        ranks = runtime.init_distributed(self.layout, config.parallel.timeout)
        _log.info("device runtime: %s", runtime.describe())
        if config.model.dtype is Dtype.bf16 and not runtime.on_cuda and bf16_is_slow():
            _log.warning(
                "model.dtype is bf16, for which this CPU has no kernels; set model.dtype=fp32, several times faster"
            )
        _log.info("training layout: %s", self.layout.describe())
        _log.info("layers: %s; fused: %s", describe_layers(), find_fusions().describe())
        if self.layout.context > 1:
            _log.info("context parallelism divides rows: every completion is computed with a prefix of its own")
        self._runtime = runtime
        self._objective = objective
        self._train = config.train
        self._max_length = config.data.suffix_length
        self._refresh_every = config.objective.reference_refresh
        self._overlap = config.parallel.overlap
        self._length_multiple = length_multiple(self.layout, config.model.fp8)
        # Context parallelism divides rows; packs have no equal chunks to divide.
        self.packed = self.layout.context == 1
        # Until then, delayed scaling takes every range for 1.
        self._uncalibrated = config.model.fp8 is Fp8.delayed
        # Without CUDA, expert-parallel ranks gather each other's tokens (policy/model.py), in equal numbers.
        self._equal_shapes = self.layout.expert > 1 and not runtime.on_cuda
        model_chunks = build_model(
            self.arch, config.model.dtype, runtime, self.layout, config.train.recompute, config.model.fp8
        )
        load_weights(model_chunks, self.arch, self.layout, Path(config.model.path))
        self._model_chunks = model_chunks
        self._routers = None
        if self.arch.experts:
            self._routers = Routers(
                model_chunks,
                self.arch,
                self.layout,
                replay=config.rollout.router_replay,
                aux_loss=config.train.router_aux_loss,
            )
        self._forward_backward = ForwardBackward(
            model_chunks, self.arch, self.layout, config.train.logprob_chunk, self._routers
        )
        self._reference = ReferenceWeights(model_chunks, version=0) if objective.facts.needs_reference else None
        with runtime.megatron():
            self._ddps, self._optimizer = build_optimizer(
                model_chunks, config.optimizer, config.model.dtype, config.parallel.overlap
            )
            self._scheduler = build_scheduler(self._optimizer, config.optimizer, config.train)
        self._offload = OptimizerOffload(parts_with_parameters(self._optimizer), runtime.device)
        # A frozen reference is the starting model, which is always loaded from its folder.
        moving = self._reference if self._refresh_every else None
        self._state = PolicyState(model_chunks, self._optimizer, self._scheduler, moving)
        bucket_bytes = config.rollout.sync_bucket_mib << 20
        self._source = WeightSource(model_chunks, self.arch, self.layout, ranks, bucket_bytes)
        self._saving: ShardedWriting | None = None
        self.version = 0

    def update(self, examples: Sequence[Example]) -> dict[str, float]:
        """Run one optimizer update on ``examples`` and increment ``version``.

        Args:
            examples: all examples of the update, the same on every rank; data-parallel ranks share them.

        Returns:
            Metrics of the update, the same on every rank: ``loss``, ``grad_norm``, ``lr``, ``tokens`` and
            ``executed_tokens`` (``policy/batching.py: MicroBatchPlan``), ``logprob_gap`` (mean absolute difference per
            token between the engine's and this policy's log-probabilities, nats), ``engine_ratio`` and
            ``engine_ratio_above_2`` (mean of a token's probability under the policy over that under the engine, and
            share above 2), all three absent without rollouts, those of the objective, and of a mixture of experts
            those of ``Routers.metrics``.

        Raises:
            TrainingError: the loss or a gradient is not finite; the weights are then unchanged.
        """
        plans = self._plan(examples)
        rank = parallel_state.get_data_parallel_rank()
        batches = [self._batch(one.shares[rank], one.shapes[rank]) for one in plans]
        if self._uncalibrated:
            self._calibrate(batches)
        references = self._reference_logprobs(batches)
        tokens = sum(plan.tokens for plan in plans)
        if self._routers and self._train.router_aux_loss:
            self._gather_parameters()
            with self._runtime.megatron():
                self._forward_backward.count_routing(batches)
                self._routers.aim(tokens, len(examples))
        with self._runtime.megatron():
            for ddp in self._ddps:
                ddp.zero_grad_buffer()
            self._optimizer.zero_grad()
            results = self._forward_backward.train(
                self._ddps, batches, lambda number, logprobs: self._loss(batches[number], logprobs, references, number)
            )
            metrics = self._mean_metrics(results, len(examples))
            if self._routers:
                metrics |= self._routers.metrics(tokens)
            self._require_finite(metrics)
            self._scheduler.step(increment=1)
            self._wait_for_snapshot()
            successful, grad_norm, _ = self._optimizer.step()
        assert successful, "only fp16 loss scaling skips a step, and it is not used"
        self.version += 1
        if self._reference and self._refresh_every and self.version % self._refresh_every == 0:
            self._gather_parameters()
            self._reference.refresh(self.version)
        if self.version % _UPDATES_PER_RETURN == 0:
            self._runtime.return_freed_memory()
        metrics["grad_norm"] = float(grad_norm)
        metrics["lr"] = float(self._optimizer.param_groups[0]["lr"])
        metrics["tokens"] = float(tokens)
        metrics["executed_tokens"] = float(sum(plan.executed_tokens for plan in plans))
        return metrics

    def logprobs(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return log-probabilities of the examples' completion tokens under the current weights, without gradients.

        All examples form one micro-batch, so pass only a few. Tokens are routed as in an update.

        Returns:
            [sequences, suffix] fp32 in the order of ``examples``, 0 where a shorter completion is padded; the same on
            every rank.
        """
        self._gather_parameters()
        # Interleaved stages need as many micro-batches as there are stages.
        others = self.layout.pipeline - 1 if self.layout.virtual_stages > 1 else 0
        batches = [
            self._batch(part, shape_of(part, packed=self.packed).padded(self._length_multiple))
            for part in (examples, *[()] * others)
        ]
        with self._runtime.megatron():
            found = self._forward_backward.logprobs(batches, replay=True)
        logprobs = found[0] if found else torch.zeros_like(batches[0].mask)
        if self.layout.pipeline > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(logprobs, group=group, group_src=self.layout.pipeline - 1)
        return logprobs

    def check_start(self, config: Config) -> None:
        """Compare the policy with ``transformers`` on the same folder; call it before any update.

        Raises:
            ModelError: they differ by more than rounding explains; not raised on every rank.
        """
        folder, longest = Path(config.model.path), config.max_sequence
        check = StartCheck(
            folder,
            self.arch,
            self.layout,
            self._model_chunks,
            dtype=config.model.dtype,
            fp8=config.model.fp8,
            longest=longest,
        )
        tokens = probe_tokens(self.arch.vocab, longest)
        probe = Episode("probe", tokens[:1], tokens[1:], "probe", "probe", 1)
        with recording(self._model_chunks, check.layers) as recorded:
            (logprobs,) = self.logprobs([Example(probe, (Candidate(Source.ORIGINAL, tokens[1:]),), (0,))])
        with self._runtime.megatron():
            line = check.compare(recorded, tokens, logprobs)
        if line:
            _log.info("%s", line)

    def weights(self) -> WeightSource:
        """Return the stream of (Hugging Face name, whole tensor) in a fixed order; may share the policy's memory.

        Every rank must iterate to the end, even if it does not use the tensors (``ranks.drain``).
        """
        self._gather_parameters()
        return self._source

    def sync_metrics(self) -> dict[str, float]:
        """Return what the last iteration over ``weights`` brought to this rank; see ``LinkBytes.metrics``."""
        return self._source.received.metrics()

    @property
    def weight_shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of ``weights``."""
        return self._source.shapes

    def offload_optimizer(self) -> None:
        """Move optimizer state to host memory and free gradient buffers; does nothing without a GPU."""
        if self._runtime.on_cuda:
            self._wait_for_snapshot()
            self._offload.offload()
            for ddp in self._ddps:
                ddp.offload_grad_buffers()

    def restore_optimizer(self) -> None:
        """Undo ``offload_optimizer``; does nothing if it was not called."""
        if self._runtime.on_cuda:
            for ddp in self._ddps:
                ddp.restore_grad_buffers()
            self._offload.restore()

    def layout_text(self) -> str:
        """Return the layout in words."""
        return self.layout.describe()

    def begin_save(self, folder: Path, snapshot: bool) -> ShardedWriting:
        """Plan a checkpoint of weights, optimizer, schedule and (if it is refreshed) reference in ``folder``.

        Args:
            folder: an existing folder.
            snapshot: copy the state while the run goes on, so that updates may run before it is written; the next
                one waits for the copy before it changes a weight.
        """
        self._gather_parameters()
        with self._runtime.megatron():
            self._wait_for_snapshot()
            self._saving = self._state.begin_save(self.version, folder, snapshot)
            return self._saving

    def load(self, folder: Path) -> None:
        """Load the checkpoint in ``folder``, written under any layout.

        Raises:
            Exception: any error of Megatron for a missing or unreadable part; the caller names the checkpoint.
        """
        with self._runtime.megatron():
            self.version = self._state.load(folder)

    def _wait_for_snapshot(self) -> None:
        """Wait until the checkpoint under way has copied the state; what it has not copied must not change."""
        if self._saving is not None:
            self._saving.wait_for_copy()
            self._saving = None

    def _plan(self, examples: Sequence[Example]) -> list[MicroBatchPlan]:
        return plan_micro_batches(
            examples,
            self._train.micro_batch,
            self.layout,
            self._length_multiple,
            packed=self.packed,
            equal=self._equal_shapes,
        )

    def _batch(self, examples: Sequence[Example], shape: BatchShape) -> Batch:
        rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        return make_batch(examples, self._runtime.device, shape, ContextShare(rank, size), packed=self.packed)

    def _reference_logprobs(self, batches: list[Batch]) -> list[torch.Tensor]:
        if self._reference is None:
            return []
        self._gather_parameters()
        with self._runtime.megatron(), self._reference.active():
            # It has routers of its own, so no record is theirs.
            return self._forward_backward.logprobs(batches, replay=False)

    def _calibrate(self, batches: list[Batch]) -> None:
        """Run a pass whose gradients nobody uses: delayed scaling records the range of values with gradients only.

        Without it, the reference of the first update of a process would be computed with other scales than the policy.
        """
        with self._runtime.megatron():
            self._forward_backward.train(
                self._ddps, batches, lambda _, logprobs: (logprobs.sum(), _MicroResult(LossTerms(logprobs)))
            )
        self._uncalibrated = False

    def _loss(
        self, batch: Batch, logprobs: torch.Tensor, references: Sequence[torch.Tensor], number: int
    ) -> tuple[torch.Tensor, _MicroResult]:
        if not batch.examples:  # empty, to match other ranks: a zero loss that still has a gradient
            return logprobs.sum() * 0.0, _MicroResult(LossTerms(logprobs.new_zeros(0)))
        terms = self._objective.loss(
            LossInputs(
                logprobs,
                batch.mask,
                batch.engine_logprobs,
                batch.advantages,
                batch.sizes,
                self._max_length,
                reference=references[number] if references else None,
            )
        )
        difference = (logprobs.detach() - batch.engine_logprobs)[~batch.engine_logprobs.isnan()]
        ratio = difference.exp()
        compared = {
            "logprob_gap": float(difference.abs().sum()),
            "engine_ratio": float(ratio.sum()),
            "engine_ratio_above_2": float((ratio > 2.0).sum()),
        }
        detached = LossTerms(terms.loss.detach(), terms.metrics)
        return terms.loss.sum(), _MicroResult(detached, compared, difference.numel())

    def _mean_metrics(self, results: Sequence[_MicroResult], examples: int) -> dict[str, float]:
        """Average over all examples of the update, on every rank."""
        sums: dict[str, float] = defaultdict(float)
        for result in results:
            sums["loss"] += float(result.terms.loss.sum())
            for name, values in result.terms.metrics.items():
                sums[name] += float(values.sum())
            for name in _COMPARED:
                sums[name] += result.compared.get(name, 0.0)
            sums["_tokens"] += result.tokens
        total = self._sum_over_replicas(dict(sums))
        tokens, compared = total.pop("_tokens"), {name: total.pop(name) for name in _COMPARED}
        metrics = {name: value / examples for name, value in total.items()}
        if tokens:
            metrics |= {name: value / tokens for name, value in compared.items()}
        return metrics

    def _sum_over_replicas(self, sums: dict[str, float]) -> dict[str, float]:
        """Sum the values of the last stages of all replicas, on every rank.

        A replica without examples has fewer names, so names are exchanged with the values.
        """
        if self.layout.world == 1:
            return sums
        if self._forward_backward.is_last_stage and self.layout.data > 1:
            group = parallel_state.get_data_parallel_group()
            parts: list[Any] = [None] * self.layout.data
            torch.distributed.all_gather_object(parts, sums, group=group)
            sums = {name: math.fsum(part.get(name, 0.0) for part in parts) for part in parts for name in part}
        if self.layout.pipeline > 1:
            box = [sums]
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast_object_list(box, group=group, group_src=self.layout.pipeline - 1)
            sums = box[0]
        return sums

    def _gather_parameters(self) -> None:
        """Gather the weights of the last update now; with overlap they are otherwise gathered in the next forward."""
        if self._overlap:
            with self._runtime.megatron():
                for ddp in self._ddps:
                    ddp.start_param_sync(force_sync=True)

    def _require_finite(self, metrics: dict[str, float]) -> None:
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(
                f"loss is {metrics['loss']} at version {self.version}; lower optimizer.lr or look at the last lines of "
                "samples.jsonl, then resume from the last checkpoint"
            )
        buffers = [buffer for ddp in self._ddps for buffer in ddp.buffers + ddp.expert_parallel_buffers]
        broken = torch.zeros(1, device=self._runtime.device)
        for buffer in buffers:
            broken += float(not math.isfinite(float(buffer.grad_data.sum())))
        if self.layout.world > 1:
            # All ranks must agree: none may step while another refuses.
            torch.distributed.all_reduce(broken)
        if broken:
            raise TrainingError(
                f"a gradient is not finite at version {self.version} (loss {metrics['loss']:.4g}); lower "
                "optimizer.lr, then resume from the last checkpoint"
            )


@dataclass(frozen=True)
class _MicroResult:
    """The results of one micro-batch: loss terms and the logprob gap between engine and policy."""

    terms: LossTerms
    compared: Mapping[str, float] = field(default_factory=dict)
    """``_COMPARED`` -> its sum over the tokens that have a log-probability of the engine."""
    tokens: int = 0
    """Number of those tokens."""
