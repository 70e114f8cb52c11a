"""Rollouts from vLLM, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.config import Config, Dtype, RolloutConfig
from megatron_rlpt.distributed.ranks import ranks_on_this_machine
from megatron_rlpt.errors import ConfigError, EngineError, ModelError
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import expected_shapes
from megatron_rlpt.models.huggingface import without_extras
from megatron_rlpt.rollout.engine import (
    Continuation,
    EngineMode,
    RolloutPrompt,
    end_of_sequence,
    require_neutral_sampling,
    require_version,
)
from megatron_rlpt.rollout.vllm.process import EngineProcess
from megatron_rlpt.rollout.vllm.runtime import generate_in_one_batch, vllm_environment
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
from megatron_rlpt.rollout.weight_sync.transport import open_transport

_log = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32
"""Tokens per cache block on CPU. vLLM's default there is 128, longer than a short prefix, which the K rollouts of an
episode could then never share."""


class VllmEngine:
    """An offline vLLM engine whose weights follow the policy's.

    Weights are exchanged through ``reload_weights`` of vLLM's worker or its weight-transfer package, which also redo
    the repacking that kernels need; writing to the model's tensors directly would miss that.

    Engines are not tensor-parallel: the engine of every rank holds the whole model on one GPU, however the policy is
    cut over ranks.
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
        mode: EngineMode = EngineMode.IN_PROCESS,
        gpu: int | None = None,
    ) -> None:
        """Start the engine on the weights of ``model_path``, which count as version 0.

        Args:
            model_path: Hugging Face folder of the starting model.
            expected: name -> shape of every weight that an update must bring.
            config: sampling and sizes; truncated sampling is refused.
            dtype: precision of the weights, the policy's own.
            max_sequence: longest prefix plus continuation, in tokens.
            seed: engine seed; every prompt has its own besides.
            mode: where the engine runs, and thereby how weights get there.
            gpu: the GPU of an engine in a process of its own, as this process counts them.

        Raises:
            ConfigError: weights and key-value cache are more than the whole GPU.
            EngineError: sampling is truncated.
            ModelError: vLLM cannot load the folder.
        """
        require_neutral_sampling(config)
        self._temperature = config.temperature
        self._manifest = WeightManifest(dict(expected), torch.bfloat16 if dtype is Dtype.bf16 else torch.float32)
        self._kv_cache_bytes = int(config.kv_cache_gib * 2**30)
        if torch.cuda.is_available():
            number = torch.cuda.current_device() if gpu is None else gpu
            total = torch.cuda.get_device_properties(number).total_memory
            require_gpu_holds(self._manifest.nbytes, self._kv_cache_bytes, total)
        # An engine on a GPU of its own is in nobody's way.
        self._can_sleep = torch.cuda.is_available() and mode is not EngineMode.OWN_GPU
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        in_process = mode is EngineMode.IN_PROCESS
        with (
            vllm_environment(config.kv_cache_gib, in_process=in_process, gpu=gpu) as arguments,
            without_extras(model_path) as served,
        ):
            from vllm import LLM, SamplingParams, TokensPrompt

            if not torch.cuda.is_available():
                arguments["block_size"] = CPU_BLOCK_TOKENS
            if mode in (EngineMode.SHARED_GPU, EngineMode.OWN_GPU):
                from megatron_rlpt.rollout.weight_sync.gpu_transport import BACKENDS

                arguments["weight_transfer_config"] = {"backend": BACKENDS[mode]}
            try:
                self._llm: Any = LLM(
                    model=str(served),
                    dtype=str(self._manifest.dtype).removeprefix("torch."),
                    max_model_len=max_sequence,
                    max_num_seqs=config.max_batch,
                    enable_prefix_caching=True,
                    enable_sleep_mode=self._can_sleep,
                    skip_tokenizer_init=True,
                    seed=seed % 2**31,
                    disable_log_stats=True,
                    trust_remote_code=False,
                    worker_extension_cls=EXTENSION,
                    **arguments,
                )
                self._process = None if in_process else EngineProcess(self._llm, "the rollout engine")
                # Some shapes load and fail only when attention runs: find out now, and not after the first data.
                self._llm.generate(
                    [TokensPrompt(prompt_token_ids=[0])], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False
                )
            except (ValueError, OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise ModelError(f"vLLM cannot serve {model_path}: {reason[0]}") from error
        self._transport = open_transport(mode, self._llm, self._manifest, config.sync_bucket_mib * 2**20)
        self._probes = probe_prompts(next(iter(expected.values()))[0], max_sequence)
        self._stop_tokens = end_of_sequence(model_path)
        self._asleep = False
        self._buffers = buffer_digests(self._llm)
        self._version: int | None = None
        self._set_version(0)
        if not self._can_sleep:
            where = "has a GPU of its own" if mode is EngineMode.OWN_GPU else "runs without a GPU"
            _log.info("the rollout engine %s and does not sleep while the policy trains", where)
        _log.info(
            "rollout sampling: temperature=%g, no top_p / top_k / min_p, generation_config.json not read, "
            "end-of-sequence tokens %s",
            config.temperature,
            self._stop_tokens,
        )

    @property
    def version(self) -> int | None:
        """Policy version of the weights in force; None after an update that failed half-way, and while asleep."""
        return self._version

    @property
    def own_process(self) -> bool:
        """Whether the engine has a process of its own."""
        return self._process is not None

    @property
    def asleep(self) -> bool:
        """Whether the engine has given its GPU memory back; the next weight update wakes it."""
        return self._asleep

    @property
    def sleep_frees_bytes(self) -> int:
        """Bytes of GPU memory that ``sleep`` gives back: weights and key-value cache; 0 where sleeping does nothing."""
        return self._manifest.nbytes + self._kv_cache_bytes if self._can_sleep else 0

    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        """See ``RolloutEngine.generate``."""
        from vllm import SamplingParams, TokensPrompt

        if self._asleep:
            raise EngineError("the rollout engine sleeps; update its weights first, which wakes it")
        require_version(self._version, version)
        if not prompts:  # a rank's share of a small batch
            return []
        parameters = [
            SamplingParams(
                temperature=0.0 if prompt.greedy else self._temperature,
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
            # Blocks left by an earlier call change the shape of the computation, and with it the last bits of the
            # result: a resumed run, whose cache is empty, would not sample what the uninterrupted one did.
            self._drop_prefix_cache()
            outputs = generate_in_one_batch(
                self._llm, [TokensPrompt(prompt_token_ids=list(prompt.prefix)) for prompt in prompts], parameters
            )
        if len(outputs) != len(prompts):
            raise EngineError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts; start the run again")
        return [self._continuation(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def update_weights(self, weights: Weights, version: int) -> None:
        """See ``RolloutEngine.update_weights``. An engine that sleeps is awake afterwards."""
        self._version = None
        with self._calling():
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._send(weights)
            if self._asleep:
                self._wake_cache()
            self._drop_prefix_cache()
            self._set_version(version)

    def self_check(self, weights: Callable[[], Weights], version: int) -> None:
        """Prove that updates arrive whole and exact; see ``rollout.self_check``.

        Args:
            weights: the policy's weights, with the values of the folder that this engine was started on. Called once.
            version: their policy version, in force afterwards.

        Raises:
            EngineError: an update changes too little or too much; the message names the tensors.
        """
        with self._calling():
            loaded = engine_state(self._llm, self._probes, "loaded")
            self._version = None
            self._send(self._manifest.random(self._device))
            self._drop_prefix_cache()
            # The same salt as below: were the cache not dropped by the next update, its blocks would be used there.
            require_all_changed(loaded, engine_state(self._llm, self._probes, "synced"))
        self.update_weights(weights(), version)
        with self._calling():
            try:
                require_restored(loaded, engine_state(self._llm, self._probes, "synced"))
            except EngineError:
                self._version = None
                raise
        _log.info("weight updates checked: %d tensors agree bit for bit", len(loaded.weights))

    def sleep(self) -> None:
        """Give the engine's GPU memory back until the next ``update_weights``; its weights are gone until then.

        vLLM's level 2, which keeps no copy in host memory: the policy sends its weights in any case. Without a GPU,
        and on a GPU of its own, the engine stays as it is.
        """
        if not self._can_sleep or self._asleep:
            return
        with self._calling():
            self._version = None
            self._llm.sleep(level=2)
            self._asleep = True

    def _wake_cache(self) -> None:
        """After the weights: the cache, and a look at whether what vLLM restored by itself is sound."""
        if not self._llm.wake_up(tags=["kv_cache"]):
            raise EngineError("vLLM did not wake up whole; start the run again, it goes on from the last checkpoint")
        self._asleep = False
        self._llm.collective_rpc("rlpt_zero_cache")
        self._drop_prefix_cache()
        self._require_sound()

    def _require_sound(self) -> None:
        """A canary: buffers as they were at the start, finite log-probabilities.

        Raises:
            EngineError: the engine would generate garbage.
        """
        for name, digest in buffer_digests(self._llm).items():
            if digest != self._buffers[name]:
                raise EngineError(f"the rollout engine woke up with another {name} than before; start the run again")
        answers = probe_answers(self._llm, self._probes, "canary")
        if not all(math.isfinite(value) for _, values in answers.values() for value in values):
            raise EngineError("the rollout engine gives log-probabilities that are not finite; start the run again")

    def _send(self, weights: Weights) -> None:
        try:
            self._transport.send(weights)
        except BaseException:
            if self._process is not None and self._device.type == "cuda":
                # It may be waiting, inside a collective, for weights that never come; nothing can load into it again.
                self._process.end()
            raise

    def _calling(self) -> contextlib.AbstractContextManager[None]:
        return self._process.calling() if self._process else contextlib.nullcontext()

    def _set_version(self, version: int) -> None:
        # vLLM stamps every token with it, see _continuation.
        self._llm.llm_engine.set_weight_version(str(version))
        self._version = version

    def _drop_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM refused to drop its prefix cache; what it holds is not of these weights or prompts")

    def _continuation(self, prompt: RolloutPrompt, output: Any) -> Continuation:
        if tuple(output.prompt_token_ids) != prompt.prefix:
            raise EngineError("vLLM returned a continuation of another prompt than the one asked for")
        completion = output.outputs[0]
        for span in completion.weight_versions or ():
            if span.version != str(self._version):
                raise EngineError(f"vLLM sampled with weights of version {span.version}, not {self._version}")
        tokens = tuple(completion.token_ids)
        logprobs = tuple(float(entry[token].logprob) for token, entry in zip(tokens, completion.logprobs, strict=True))
        return Continuation(tokens, logprobs, str(completion.finish_reason))


def start_policy_engine(config: Config, own_process: bool = False) -> VllmEngine:
    """The engine of this rank, on the weights of ``model.path`` as version 0; raises what ``VllmEngine`` does.

    Args:
        config: the run.
        own_process: whether it gets a process of its own.
    """
    folder = Path(config.model.path)
    mode, gpu = choose_mode(own_process)
    return VllmEngine(
        folder,
        expected_shapes(read_architecture(folder)),
        config.rollout,
        dtype=config.model.dtype,
        max_sequence=config.max_sequence,
        seed=config.run.seed,
        mode=mode,
        gpu=gpu,
    )


def needs_process(config: Config, world_size: int) -> bool:
    """Whether a vLLM engine gets a process of its own.

    It has to beside a world of more than one rank. Where it generates while the policy trains, the two would wait for
    each other's Python in one process.
    """
    return world_size > 1 or config.train.staleness > 0


def choose_mode(own_process: bool) -> tuple[EngineMode, int | None]:
    """Where this rank's engine runs, and on which GPU (None: as the process itself).

    On a machine with at least twice as many GPUs as ranks, engines with a process of their own take the GPUs that no
    rank trains on.
    """
    if not own_process:
        return EngineMode.IN_PROCESS, None
    if not torch.cuda.is_available():
        return EngineMode.OWN_PROCESS, None
    gpus, own = torch.cuda.device_count(), torch.cuda.current_device()
    ranks = ranks_on_this_machine() or gpus
    if 2 * ranks <= gpus:
        return EngineMode.OWN_GPU, ranks + own
    return EngineMode.SHARED_GPU, own


def require_gpu_holds(weights: int, cache: int, total: int) -> None:
    """Refuse an engine that no GPU of this size can hold, before anything is loaded; all sizes are in bytes.

    Args:
        weights: the whole model, since engines are not tensor-parallel.
        cache: the key-value cache.
        total: the GPU's memory, free or not.

    Raises:
        ConfigError: they are more than ``total``.
    """
    if weights + cache > total:
        raise ConfigError(
            f"a rollout engine holds the whole model, {weights / 2**30:.1f} GiB, and rollout.kv_cache_gib = "
            f"{cache / 2**30:g} of cache, and its GPU has {total / 2**30:.1f} GiB; lower rollout.kv_cache_gib or "
            "set rollout.engine=megatron, which cuts the model over GPUs"
        )
