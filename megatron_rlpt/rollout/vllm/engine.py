"""Rollouts from vLLM, in this process or in a separate one."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from megatron_rlpt.config import Config, Dtype, EngineFp8, RolloutConfig
from megatron_rlpt.errors import ConfigError, EngineError, EngineLostError, ModelError, first_line
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import expected_shapes
from megatron_rlpt.models.huggingface import without_extras
from megatron_rlpt.policy.precision import torch_dtype_of
from megatron_rlpt.rollout.engine import (
    Continuation,
    RolloutEngine,
    RolloutPrompt,
    end_of_sequence,
    require_version,
)
from megatron_rlpt.rollout.placement import IN_THIS_PROCESS, EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm.process import EngineProcess, was_killed_at_start
from megatron_rlpt.rollout.vllm.routing import RECORD, recorded_routing, routing_arguments
from megatron_rlpt.rollout.vllm.runtime import CPU_BLOCK_TOKENS, generate_in_one_batch, vllm_environment
from megatron_rlpt.rollout.vllm.worker import EXTENSION
from megatron_rlpt.rollout.weight_sync.manifest import WeightManifest, Weights
from megatron_rlpt.rollout.weight_sync.self_check import (
    buffer_digests,
    engine_state,
    probe_answers,
    probe_prompts,
    require_all_changed,
    require_restored,
)
from megatron_rlpt.rollout.weight_sync.transport import SharedMemoryTransport, Transport, open_transport
from megatron_rlpt.types import Routing

_log = logging.getLogger(__name__)

_MOST_RESTARTS = 3
"""Times in a run that an engine whose process has ended is started again."""


class VllmEngine(RolloutEngine):
    """An offline vLLM engine whose weights follow the policy's.

    Weights are replaced through ``reload_weights`` of vLLM's worker or its weight-transfer package, which also repack
    them for the kernels; writing to the model's tensors directly would skip that.

    An engine that ranks share exists on each of them with its part of the weights: all make the same calls, schedule
    the same way and get the same answers.
    """

    def __init__(
        self,
        model_path: Path,
        expected: Mapping[str, tuple[int, ...]],
        config: RolloutConfig,
        *,
        dtype: Dtype,
        max_sequence: int,
        seed: int,
        place: EnginePlace = IN_THIS_PROCESS,
    ) -> None:
        """Start the engine on the weights of ``model_path`` as version 0.

        Args:
            model_path: Hugging Face folder of the starting model.
            expected: name -> shape of every weight that an update must contain.
            config: sampling and sizes; truncated sampling is refused.
            dtype: precision of the weights, the same as the policy's.
            max_sequence: longest prefix plus continuation, in tokens.
            seed: engine seed; every prompt also has its own seed.
            place: where the engine runs, and over how many GPUs.

        Raises:
            ConfigError: weights and key-value cache do not fit on the GPU.
            EngineError: sampling is truncated.
            EngineLostError: the engine's process was killed too often.
            ModelError: vLLM cannot serve the folder.
        """
        self._model_path = model_path
        self._config = config
        self._max_sequence = max_sequence
        self._seed = seed
        self._place = place
        self._arch = read_architecture(model_path)
        self._manifest = WeightManifest(dict(expected), torch_dtype_of(dtype))
        self._kv_cache_bytes = int(config.kv_cache_gib * 2**30)
        if torch.cuda.is_available():
            number = place.gpus[0] if place.gpus else torch.cuda.current_device()
            total = torch.cuda.get_device_properties(number).total_memory
            require_gpu_holds(self._manifest.nbytes // place.tensor, self._kv_cache_bytes, total)
        # An engine on its own GPU competes with nothing for memory.
        self._can_sleep = torch.cuda.is_available() and place.mode is not EngineMode.OWN_GPU
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._process: EngineProcess | None = None
        self._restarts = 0
        self._llm = self._start()
        self._transport = self._connect()
        self._probes = probe_prompts(next(iter(expected.values()))[0], max_sequence)
        self._stop_tokens = end_of_sequence(model_path)
        self._asleep = False
        self._buffers = buffer_digests(self._llm)
        self._version: int | None = None
        self._set_version(0)
        # vLLM's own log says so in many lines that VLLM_LOGGING_LEVEL hides.
        kernels = self._llm.collective_rpc("rlpt_kernels")[0]
        _log.info("rollout engine: %s kv_cache_gib=%g", kernels, config.kv_cache_gib)
        if not self._can_sleep:
            why = "own GPU" if place.mode is EngineMode.OWN_GPU else "no GPU"
            _log.info("rollout engine never sleeps: %s", why)
        _log.info(
            "rollout sampling: temperature=%g stop_tokens=%s, generation_config.json ignored",
            config.temperature,
            self._stop_tokens,
        )

    def _start(self) -> Any:
        """Start vLLM on the weights of the folder, again if its process is killed meanwhile."""
        while True:
            try:
                return self._start_once()
            except EngineLostError as error:
                self._count_restart(error)

    def _start_once(self) -> Any:
        """Start vLLM, and let it compute one token."""
        config, place = self._config, self._place
        with (
            vllm_environment(config.kv_cache_gib, place, eager=config.eager) as arguments,
            without_extras(self._model_path) as served,
        ):
            from vllm import LLM, SamplingParams, TokensPrompt

            self._process = None
            on_cuda = self._device.type == "cuda"
            if config.router_replay:
                arguments |= routing_arguments(on_cuda=on_cuda)
            if config.fp8 is not EngineFp8.off:
                arguments["quantization"] = f"fp8_{config.fp8.value}"
            if place.mode in (EngineMode.SHARED_GPU, EngineMode.OWN_GPU):
                from megatron_rlpt.rollout.weight_sync.gpu_transport import BACKENDS

                arguments["weight_transfer_config"] = {"backend": BACKENDS[place.mode]}
            try:
                llm: Any = LLM(
                    model=str(served),
                    dtype=str(self._manifest.dtype).removeprefix("torch."),
                    max_model_len=self._max_sequence,
                    max_num_seqs=config.max_batch,
                    enable_prefix_caching=True,
                    enable_sleep_mode=self._can_sleep,
                    skip_tokenizer_init=True,
                    seed=self._seed % 2**31,
                    disable_log_stats=True,
                    trust_remote_code=False,
                    worker_extension_cls=EXTENSION,
                    **arguments,
                )
                self._process = None if place.mode.in_process else EngineProcess(llm, "the rollout engine")
                with self._calling():
                    if config.router_replay and not on_cuda:
                        llm.collective_rpc(RECORD)
                    # Some shapes load and fail only when attention runs: find out now, before any data is read.
                    one_token = SamplingParams(max_tokens=1, detokenize=False)
                    llm.generate([TokensPrompt(prompt_token_ids=[0])], one_token, use_tqdm=False)
            except EngineLostError as error:
                if self._process is None or self._process.was_killed:
                    raise
                codes = self._process.exit_codes()
                raise ModelError(
                    f"vLLM cannot serve {self._model_path}: its process failed (exit code {codes}); what it printed is "
                    "above"
                ) from error
            except (ValueError, OSError, RuntimeError) as error:
                if was_killed_at_start(error):
                    raise EngineLostError(f"the rollout engine was killed at its start: {first_line(error)}") from error
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise ModelError(f"vLLM cannot serve {self._model_path}: {reason[0]}") from error
        return llm

    def _connect(self) -> Transport:
        return open_transport(self._place, self._llm, self._manifest, self._config.sync_bucket_mib * 2**20)

    @property
    def is_lost(self) -> bool:
        """Whether the engine's process has ended."""
        return self._process is not None and self._process.has_ended

    def restart(self, error: EngineLostError) -> None:
        """Start the engine again in place of one whose process has ended; it waits for weights.

        Args:
            error: says how it ended.

        Raises:
            EngineLostError: it has ended too often.
        """
        self._count_restart(error)
        self._version, self._asleep = None, False
        self._llm = self._start()
        if not isinstance(self._transport, SharedMemoryTransport):
            self._transport = self._connect()

    def _count_restart(self, error: EngineLostError) -> None:
        if self._restarts == _MOST_RESTARTS:
            raise error
        self._restarts += 1
        _log.warning("%s; starting it again, attempt %d of %d", error, self._restarts, _MOST_RESTARTS)

    def _restore(self, error: EngineLostError, version: int) -> None:
        """Start the engine again with the weights that it had or was getting.

        Args:
            error: says how it ended.
            version: policy version of those weights.

        Raises:
            EngineLostError: it has ended too often, or only the policy has its weights (on GPUs).
        """
        if not isinstance(self._transport, SharedMemoryTransport):
            raise error
        self.restart(error)
        with self._calling():
            self._transport.reconnect(self._llm)
            self._drop_prefix_cache()
            self._require_sound()
            self._set_version(version)

    @property
    @override
    def version(self) -> int | None:
        """Policy version of the engine's weights; None after a failed update and while asleep."""
        return self._version

    @property
    def own_process(self) -> bool:
        """Whether the engine runs in a separate process."""
        return self._process is not None

    @property
    def asleep(self) -> bool:
        """Whether the engine has released its GPU memory; the next weight update wakes it."""
        return self._asleep

    @property
    def sleep_frees_bytes(self) -> int:
        """Bytes of GPU memory that ``sleep`` releases: weights and key-value cache; 0 if the engine never sleeps."""
        return self._manifest.nbytes // self._place.tensor + self._kv_cache_bytes if self._can_sleep else 0

    @override
    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        """Generate; an engine whose process has ended is started again and generates once more."""
        while True:
            try:
                return self._generate(prompts, max_tokens, version)
            except EngineLostError as error:
                self._restore(error, version)

    def _generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        from vllm import SamplingParams, TokensPrompt

        if self._asleep:
            raise EngineError("the rollout engine is asleep; update its weights to wake it")
        require_version(self._version, version)
        if not prompts:  # a rank's share of a small batch
            return []
        parameters = [
            SamplingParams(
                temperature=0.0 if prompt.greedy else self._config.temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                seed=prompt.seed,
                max_tokens=max_tokens,
                stop_token_ids=self._stop_tokens,
                logprobs=0,
                detokenize=False,
            )
            for prompt in prompts
        ]
        with self._calling():
            # Cache blocks of an earlier call change the shapes of the computation and thereby its rounding: a resumed
            # run, whose cache is empty, would not sample the same tokens as an uninterrupted one.
            self._drop_prefix_cache()
            outputs = generate_in_one_batch(
                self._llm, [TokensPrompt(prompt_token_ids=list(prompt.prefix)) for prompt in prompts], parameters
            )
            if len(outputs) != len(prompts):
                raise EngineError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts; run the same command again")
            routings: Sequence[Routing | None] = [None] * len(outputs)
            if self._config.router_replay:
                routings = recorded_routing(
                    self._llm, outputs, self._arch, on_cuda=self._device.type == "cuda", block=CPU_BLOCK_TOKENS
                )
        return [self._continuation(*answer) for answer in zip(prompts, outputs, routings, strict=True)]

    @override
    def update_weights(self, weights: Weights, version: int) -> None:
        """Replace all weights, and wake the engine if it sleeps."""
        self._version = None
        try:
            with self._calling():
                if self._asleep:
                    self._llm.wake_up(tags=["weights"])
                self._send(weights)
                if self._asleep:
                    self._wake_cache()
                self._drop_prefix_cache()
                self._set_version(version)
        except EngineLostError as error:
            self._restore(error, version)

    def self_check(self, weights: Callable[[], Weights], version: int) -> None:
        """Check that an update reaches every weight bit for bit (``weight_sync/self_check.py``).

        Args:
            weights: returns the policy's weights, which equal those of this engine's folder. Called once.
            version: their policy version.

        Raises:
            EngineError: an update changes too little or too much; names the tensors.
        """
        with self._calling():
            loaded = engine_state(self._llm, self._probes, "loaded")
            self._version = None
            self._send(self._manifest.random(self._device))
            self._drop_prefix_cache()
            # The same salt as below, so that blocks which the next update fails to drop would be used there.
            require_all_changed(loaded, engine_state(self._llm, self._probes, "synced"))
        self.update_weights(weights(), version)
        with self._calling():
            try:
                require_restored(loaded, engine_state(self._llm, self._probes, "synced"))
            except EngineError:
                self._version = None
                raise
        _log.info("weight sync checked: tensors=%d, all bit-identical", len(loaded.weights))

    def sleep(self) -> None:
        """Release the engine's GPU memory, including its weights, until the next ``update_weights``.

        This is vLLM's level 2, which keeps no copy in host memory, because the policy sends its weights anyway. Does
        nothing without a GPU or on a GPU of its own.
        """
        if not self._can_sleep or self._asleep:
            return
        with self._calling():
            self._version = None
            self._llm.sleep(level=2)
            self._asleep = True

    def _wake_cache(self) -> None:
        """Wake the key-value cache after the weights, and check the state that vLLM restored itself."""
        if not self._llm.wake_up(tags=["kv_cache"]):
            raise EngineError(
                "vLLM did not wake up completely; run the same command to resume from the last checkpoint"
            )
        self._asleep = False
        self._llm.collective_rpc("rlpt_zero_cache")
        self._drop_prefix_cache()
        self._require_sound()

    def _require_sound(self) -> None:
        """Check that buffers are unchanged since the start and that log-probabilities are finite.

        Raises:
            EngineError: they are not.
        """
        for name, digest in buffer_digests(self._llm).items():
            if digest != self._buffers[name]:
                raise EngineError(
                    f"the rollout engine woke up with another {name} than before; run the same command to resume"
                )
        answers = probe_answers(self._llm, self._probes, "canary")
        if not all(math.isfinite(value) for _, values in answers.values() for value in values):
            raise EngineError("log-probabilities of the rollout engine are not finite; run the same command to resume")

    def _send(self, weights: Weights) -> None:
        try:
            self._transport.send(weights)
        except BaseException:
            if self._process is not None and self._device.type == "cuda":
                # It may wait inside a collective for weights that never come, and can load nothing else.
                self._process.end()
            raise

    def _calling(self) -> contextlib.AbstractContextManager[None]:
        return self._process.calling() if self._process else contextlib.nullcontext()

    def _set_version(self, version: int) -> None:
        # vLLM records it with every token, see _continuation.
        self._llm.llm_engine.set_weight_version(str(version))
        self._version = version

    def _drop_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM did not drop its prefix cache, which holds results of other weights; run it again to resume"
            )

    def _continuation(self, prompt: RolloutPrompt, output: Any, routing: Routing | None) -> Continuation:
        if tuple(output.prompt_token_ids) != prompt.prefix:
            raise EngineError("vLLM returned a continuation of another prompt; run the same command to resume")
        completion = output.outputs[0]
        for span in completion.weight_versions or ():
            if span.version != str(self._version):
                raise EngineError(f"vLLM sampled with weights of version {span.version}, not {self._version}")
        tokens = tuple(completion.token_ids)
        logprobs = tuple(float(entry[token].logprob) for token, entry in zip(tokens, completion.logprobs, strict=True))
        return Continuation(tokens, logprobs, str(completion.finish_reason), routing)


def start_policy_engine(config: Config, place: EnginePlace = IN_THIS_PROCESS) -> VllmEngine:
    """Start the engine of this rank on the weights of ``model.path`` as version 0; raises as ``VllmEngine``.

    Args:
        config: the run.
        place: where it runs.
    """
    folder = Path(config.model.path)
    return VllmEngine(
        folder,
        expected_shapes(read_architecture(folder)),
        config.rollout,
        dtype=config.model.dtype,
        max_sequence=config.max_sequence,
        seed=config.run.seed,
        place=place,
    )


def require_gpu_holds(weights: int, cache: int, total: int) -> None:
    """Refuse an engine that does not fit on its GPU, before anything is loaded; all sizes are in bytes.

    Args:
        weights: the engine's weights on that GPU.
        cache: the key-value cache.
        total: the GPU's total memory.

    Raises:
        ConfigError: they exceed ``total``.
    """
    if weights + cache > total:
        raise ConfigError(
            f"a rollout engine holds {weights / 2**30:.1f} GiB of weights and rollout.kv_cache_gib = "
            f"{cache / 2**30:g} of cache on each GPU, which has {total / 2**30:.1f} GiB; lower rollout.kv_cache_gib, "
            "or raise rollout.tensor to divide the weights over more GPUs"
        )
