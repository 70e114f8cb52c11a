"""Rollouts from Megatron's own inference, with the same code on CPU and CUDA.

A second copy of the network in the rollout layout (``model.py``) gets its weights from the training layout through
``megatron.core.resharding`` (``weight_sync/megatron_refit.py``) and runs in Megatron's static-batch generation loop
(``sampling.py``).

Megatron's dynamic loop (``megatron/core/inference/engines/dynamic_engine.py``), which it recommends on GPUs, is not
used: it needs flash-attn's and Triton's CUDA kernels, and it draws the tokens of all requests from one generator, so a
rollout would depend on the other requests of its batch. ``StaticInferenceEngine`` is not used either: it adds a queue
of text prompts, a progress bar, and a reseeding of the process's random numbers. Not yet measured on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from megatron_rlpt.config import Config, Dtype, RolloutConfig
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import Architecture, read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.megatron_compat import inference_wrapper, static_context
from megatron_rlpt.policy.precision import torch_dtype_of
from megatron_rlpt.policy.requirements import check_no_experts
from megatron_rlpt.rollout.engine import (
    Continuation,
    RolloutEngine,
    RolloutPrompt,
    end_of_sequence,
    require_version,
)
from megatron_rlpt.rollout.weight_sync.manifest import Weights

_log = logging.getLogger(__name__)


class MegatronEngine(RolloutEngine):
    """A ``RolloutEngine`` on a Megatron model whose weights follow the policy's.

    All ranks call it concurrently with the same arguments. Each tensor-parallel group generates a share of the prompts,
    and every rank gets all continuations.
    """

    def __init__(
        self,
        model_path: Path,
        config: RolloutConfig,
        runtime: DeviceRuntime,
        ranks: Ranks,
        *,
        dtype: Dtype,
        max_sequence: int,
    ) -> None:
        """Build the model with the weights of ``model_path`` as version 0.

        Args:
            model_path: Hugging Face folder of the starting model.
            config: sampling and sizes; truncated sampling is refused.
            runtime: with the process groups of the training layout initialized.
            ranks: all ranks of the run, as ``runtime.init_distributed`` returned them.
            dtype: precision of the weights, the same as the policy's.
            max_sequence: longest prefix plus continuation, in tokens.

        Raises:
            EngineError: sampling is truncated, the model has experts, or the cache is too small for one sequence.
            ModelError: the folder cannot be used.
        """
        from megatron_rlpt.rollout.megatron.model import build_rollout_model
        from megatron_rlpt.rollout.megatron.sampling import SeededController
        from megatron_rlpt.rollout.weight_sync.megatron_refit import RolloutWeights

        arch = read_architecture(model_path)
        check_no_experts(arch, model_path)
        self._runtime = runtime
        self._ranks = ranks
        self._max_sequence = max_sequence
        self._max_batch = config.max_batch
        model = build_rollout_model(arch, dtype, runtime)
        self._groups = model.pg_collection
        self._tensor = self._groups.tp
        self._cache_tokens = _cache_tokens(config, arch, dtype, self._tensor.size())
        if self._cache_tokens < max_sequence:
            needed = config.kv_cache_gib * max_sequence / max(self._cache_tokens, 1)
            raise EngineError(
                f"rollout.kv_cache_gib is {config.kv_cache_gib:g}, room for {self._cache_tokens} tokens; one sequence "
                f"of {max_sequence} tokens needs {needed:.3g}"
            )
        stop_tokens = end_of_sequence(model_path)
        with runtime.megatron():
            self._wrapped: Any = inference_wrapper(model, self._smallest_context(), config.max_batch, max_sequence)
            self._controller = SeededController(
                self._wrapped, vocab=arch.vocab, stop_tokens=stop_tokens, temperature=config.temperature
            )
        self._weights = RolloutWeights(model, arch, runtime, ranks)
        self._version: int | None = None
        self.update_weights(WeightFolder(model_path).stream(arch), 0)
        _log.info(
            "rollout engine: megatron static inference, device=%s tensor=%d temperature=%g stop_tokens=%s",
            runtime.name,
            self._tensor.size(),
            config.temperature,
            stop_tokens,
        )

    @property
    @override
    def version(self) -> int | None:
        return self._version

    @override
    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        """Generate one continuation per prompt; every rank gets all of them, in order.

        Raises:
            EngineError: the engine's weights are not those of ``version``, or a prompt is empty or too long.
        """
        require_version(self._version, version)
        for prompt in prompts:
            if not prompt.prefix or len(prompt.prefix) + max_tokens > self._max_sequence:
                raise EngineError(
                    f"a prompt of {len(prompt.prefix)} tokens and {max_tokens} new ones were requested; allowed: at "
                    f"least 1 and together at most {self._max_sequence} (data.max_prefix + data.suffix_length)"
                )
        # Megatron numbers tensor-parallel ranks first, so each group is a run of consecutive ranks.
        group, position = divmod(self._ranks.rank, self._tensor.size())
        groups = self._ranks.size // self._tensor.size()
        mine = self._generate(prompts[group::groups], max_tokens)
        shares = self._ranks.all_gather(mine if position == 0 else [])[:: self._tensor.size()]
        return [shares[index % groups][index // groups] for index in range(len(prompts))]

    @override
    def update_weights(self, weights: Weights, version: int) -> None:
        """Replace all weights.

        A source that has the Megatron model (``megatron_refit.MegatronModelSource``) is resharded directly; any other
        source is streamed.
        """
        from megatron_rlpt.rollout.weight_sync.megatron_refit import MegatronModelSource

        self._version = None
        if isinstance(weights, MegatronModelSource):
            self._weights.reshard(weights.model_chunks)
        else:
            self._weights.load(weights)
        self._version = version

    def self_check(self, weights: Callable[[], Weights], version: int) -> None:
        """Check that updates reach every weight: randomize all weights, load the policy's, and compare.

        Args:
            weights: returns the policy's weights, which equal those of this engine's folder. Called once.
            version: their policy version.

        Raises:
            EngineError: some weights differ from those loaded from the folder; names the first.
        """
        loaded = self._weights.digests()
        self._weights.randomise()
        self.update_weights(weights(), version)
        now = self._weights.digests()
        differing = [name for name, digest in loaded.items() if now[name] != digest]
        for rank, found in enumerate(self._ranks.all_gather(differing)):
            if found:
                self._version = None
                raise EngineError(
                    f"after a weight update {len(found)} weights of the rollout engine on rank {rank} are not what was "
                    f"loaded from the model's folder, the first is {found[0]!r}; policy and engine do not hold the "
                    "same model"
                )
        _log.info("weight sync checked: tensors=%d, all bit-identical", len(loaded))

    def _generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int) -> list[Continuation]:
        answers: dict[int, Continuation] = {}
        for indices in self._batches([len(prompt.prefix) for prompt in prompts], max_tokens):
            batch = [prompts[index] for index in indices]
            # A new cache for every batch: it holds nothing computed under old weights, and the trainer gets its memory
            # between calls.
            self._wrapped.inference_context = static_context(
                len(batch), len(batch[-1].prefix) + max_tokens, self._groups
            )
            try:
                with self._runtime.megatron():
                    generated = self._controller.continuations(batch, max_tokens)
            finally:
                self._wrapped.inference_context = self._smallest_context()
            answers.update(zip(indices, generated, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def _smallest_context(self) -> Any:
        return static_context(1, 1, self._groups)

    def _batches(self, lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
        """Yield indices of prompts in batches that fit, sorted by length with the longest last.

        Megatron prefills a batch up to its shortest prompt and reads the rest token by token. If lengths in a batch
        differ by more than ``max_tokens``, two batches take fewer steps.
        """
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            longest = lengths[index] + max_tokens
            full = len(batch) == self._max_batch or (len(batch) + 1) * longest > self._cache_tokens
            if batch and (full or lengths[index] - lengths[batch[0]] > max_tokens):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def start_policy_engine(config: Config, runtime: DeviceRuntime, ranks: Ranks) -> MegatronEngine:
    """Start the engine of ``config`` on the weights of ``model.path`` as version 0; raises as ``MegatronEngine``."""
    return MegatronEngine(
        Path(config.model.path),
        config.rollout,
        runtime,
        ranks,
        dtype=config.model.dtype,
        max_sequence=config.max_sequence,
    )


def _cache_tokens(config: RolloutConfig, arch: Architecture, dtype: Dtype, ranks: int) -> int:
    """Return how many tokens of a batch fit into ``rollout.kv_cache_gib`` on one rank."""
    per_token = 2 * arch.layers * (arch.kv_heads // ranks) * arch.head_dim * torch_dtype_of(dtype).itemsize
    return int(config.kv_cache_gib * 2**30) // per_token
