"""The policy as the training loop sees it: update, weights, save, load."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_rlpt.config import Config
from megatron_rlpt.errors import ModelError, TrainingError
from megatron_rlpt.objectives import Example, LossTerms, Objective
from megatron_rlpt.policy.batching import Batch, make_batch, micro_batches
from megatron_rlpt.policy.families import read_architecture
from megatron_rlpt.policy.logprobs import chunked_logprobs
from megatron_rlpt.policy.model import build_model
from megatron_rlpt.policy.optimizer import build_optimizer, build_scheduler, load_optimizer_state
from megatron_rlpt.policy.reference import ReferenceWeights
from megatron_rlpt.policy.runtime import DeviceRuntime
from megatron_rlpt.policy.weights import load_weights, stream_weights

_log = logging.getLogger(__name__)


class Policy:
    """A Megatron model with its optimizer, learning-rate schedule and reference weights.

    Attributes:
        arch: the architecture, as read from the starting model.
        version: number of optimizer updates behind the current weights.
    """

    def __init__(self, config: Config, objective: Objective, runtime: DeviceRuntime) -> None:
        """Load the starting model of ``config.model.path``.

        Raises:
            ModelError: the folder cannot be used, or its context is shorter than a training sequence.
        """
        folder = Path(config.model.path)
        self.arch = read_architecture(folder)
        if config.max_sequence > self.arch.max_positions:
            raise ModelError(
                f"data.max_prefix + data.suffix_length is {config.max_sequence} tokens; {folder} allows "
                f"{self.arch.max_positions}"
            )
        runtime.init_distributed()
        _log.info("device runtime: %s", runtime.describe())
        self._runtime = runtime
        self._objective = objective
        self._train = config.train
        self._refresh_every = config.objective.reference_refresh
        self._model = build_model(self.arch, config.model.dtype, runtime)
        load_weights(self._model, self.arch, folder)
        self._reference = ReferenceWeights(self._model, version=0) if objective.needs_reference else None
        with runtime.megatron():
            self._ddp, self._optimizer = build_optimizer(self._model, config.optimizer, config.model.dtype)
            self._scheduler = build_scheduler(self._optimizer, config.optimizer, config.train)
        self.version = 0

    def update(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimizer update on ``examples``; afterwards ``version`` is one higher.

        Returns:
            Figures of the update: ``loss``, ``grad_norm``, ``lr``, ``logprob_gap`` (mean absolute difference per
            token between the engine's and this policy's log-probabilities, nats; absent without rollouts), and the
            objective's own.

        Raises:
            TrainingError: loss or gradient is not finite; the weights are then unchanged.
        """
        batches = list(micro_batches(examples, self._train.micro_batch, self._runtime.device))
        references = self._reference_logprobs(batches)
        with self._runtime.megatron():
            self._ddp.zero_grad_buffer()
            self._optimizer.zero_grad()
            results = self._forward_backward(batches, references)
            figures = _mean_figures(results, len(examples))
            self._require_finite(figures)
            self._scheduler.step(increment=1)
            successful, grad_norm, _ = self._optimizer.step()
        assert successful, "only fp16 loss scaling skips a step, and it is not used"
        self.version += 1
        if self._reference and self._refresh_every and self.version % self._refresh_every == 0:
            self._reference.refresh(self.version)
        figures["grad_norm"] = float(grad_norm)
        figures["lr"] = float(self._optimizer.param_groups[0]["lr"])
        return figures

    def logprobs(self, examples: Sequence[Example]) -> torch.Tensor:
        """Log-probabilities of the examples' completion tokens under the current weights, without gradients.

        Returns:
            [sequences, suffix] fp32 in the order of ``examples``, 0 where a shorter completion is padded.
        """
        batch = make_batch(examples, self._runtime.device)
        with torch.no_grad(), self._runtime.megatron():
            return self._batch_logprobs(batch)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of every weight in one fixed order; tensors may share the policy's memory."""
        return stream_weights(self._model, self.arch)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer, schedule and (when it moves) reference as a Megatron distributed checkpoint."""
        from megatron.core import dist_checkpointing

        folder.mkdir(parents=True, exist_ok=True)
        with self._runtime.megatron(), _plain_errors():
            dist_checkpointing.save(self._sharded_state(is_loading=False), str(folder))

    def load(self, folder: Path) -> None:
        """Take over what ``save`` wrote.

        Raises:
            Exception: whatever Megatron raises for a missing or unreadable part; the caller names the checkpoint.
        """
        from megatron.core import dist_checkpointing

        if not (folder / "common.pt").is_file():
            raise FileNotFoundError(f"{folder / 'common.pt'} does not exist")  # Megatron's own message crashes
        with self._runtime.megatron(), _plain_errors():
            state = dist_checkpointing.load(self._sharded_state(is_loading=True), str(folder))
            self._model.load_state_dict(state["model"])
            load_optimizer_state(self._optimizer, state["optimizer"])
            self._scheduler.num_steps = 0  # load_state_dict adds the checkpoint's steps to its own
            self._scheduler.load_state_dict(state["scheduler"])
        self.version = int(state["version"])
        if self._reference is not None and self._refresh_every:
            self._reference.load_state_dict(state["reference"], int(state["reference_version"]))

    def _sharded_state(self, is_loading: bool) -> dict[str, Any]:
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        model = self._model.sharded_state_dict()
        state: dict[str, Any] = {
            "model": model,
            "optimizer": self._optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
            "scheduler": self._scheduler.state_dict(),
            "version": self.version,
        }
        if self._reference is not None and self._refresh_every:
            # A frozen reference is the starting model and is read from there again.
            state["reference"] = self._reference.state_dict()
            state["reference_version"] = self._reference.version
        return state

    def _forward_backward(self, batches: list[Batch], references: list[torch.Tensor | None]) -> list[_MicroResult]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        total = sum(batch.examples for batch in batches)

        def forward_step(data: Iterator[tuple[Batch, torch.Tensor | None]], model: torch.nn.Module) -> tuple[Any, Any]:
            batch, reference = next(data)
            hidden = model(batch.tokens, _positions(batch.tokens), None)
            return hidden, partial(finish, batch, reference)

        def finish(batch: Batch, reference: torch.Tensor | None, hidden: torch.Tensor) -> tuple[Any, Any]:
            logprobs = self._from_hidden(hidden, batch)
            terms = self._objective.loss(logprobs, batch.mask, reference)
            # Megatron divides by the number of micro-batches; the mean is over examples, whatever their split.
            scaled = terms.loss.sum() * len(batches) / total
            gap = (logprobs.detach() - batch.engine_logprobs).abs()
            compared = ~batch.engine_logprobs.isnan()
            detached = LossTerms(terms.loss.detach(), terms.metrics)
            return scaled, _MicroResult(detached, float(gap[compared].sum()), int(compared.sum()))

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(list(zip(batches, references, strict=True))),
            model=[self._ddp],
            num_microbatches=len(batches),
            seq_length=max(batch.tokens.shape[1] for batch in batches),
            micro_batch_size=max(batch.tokens.shape[0] for batch in batches),
            forward_only=False,
        )

    def _reference_logprobs(self, batches: list[Batch]) -> list[torch.Tensor | None]:
        if self._reference is None:
            return [None] * len(batches)
        with self._runtime.megatron(), self._reference.active():
            return [self._batch_logprobs(batch) for batch in batches]

    def _batch_logprobs(self, batch: Batch) -> torch.Tensor:
        return self._from_hidden(self._model(batch.tokens, _positions(batch.tokens), None), batch)

    def _from_hidden(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[rows, seq, hidden] -> [rows, suffix] log-probabilities of the completion tokens."""
        needed = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.predictors)
        flat = chunked_logprobs(
            needed, self._model.output_weight()[: self.arch.vocab], batch.targets, self._train.logprob_chunk
        )
        return batch.scatter(flat)

    def _require_finite(self, figures: dict[str, float]) -> None:
        if not math.isfinite(figures["loss"]):
            raise TrainingError(
                f"loss is {figures['loss']} at version {self.version}; lower optimizer.lr or look at the last lines of "
                "samples.jsonl, then start again from the last checkpoint"
            )
        for buffer in self._ddp.buffers:
            if not math.isfinite(float(buffer.grad_data.sum())):
                raise TrainingError(
                    f"a gradient is not finite at version {self.version} (loss {figures['loss']:.4g}); lower "
                    "optimizer.lr, then start again from the last checkpoint"
                )


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the cause of torch's CheckpointException, which is a BaseException that no ``except Exception`` sees."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from cause.__cause__


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)


@dataclass(frozen=True)
class _MicroResult:
    """What one micro-batch leaves behind: loss terms, and engine against trainer."""

    terms: LossTerms
    gap_sum: float
    gap_tokens: int


def _mean_figures(results: list[_MicroResult], examples: int) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for result in results:
        sums["loss"] += float(result.terms.loss.sum())
        for name, values in result.terms.metrics.items():
            sums[name] += float(values.sum())
    figures = {name: value / examples for name, value in sums.items()}
    compared = sum(result.gap_tokens for result in results)
    if compared:
        figures["logprob_gap"] = sum(result.gap_sum for result in results) / compared
    return figures
