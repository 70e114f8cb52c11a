"""Rollouts from vLLM, in this process."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.config import Config, Dtype, RolloutConfig
from megatron_rlpt.errors import EngineError, ModelError
from megatron_rlpt.policy.families import expected_shapes, read_architecture
from megatron_rlpt.rollout.engine import Continuation, Prompt, require_neutral_sampling
from megatron_rlpt.vllm_runtime import vllm_environment

_log = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32
"""Tokens per cache block on CPU. vLLM's default there is 128, longer than a short prefix, which the K rollouts of an
episode could then never share."""


class VllmEngine:
    """An offline vLLM engine whose weights follow the policy's.

    Weights are exchanged through ``reload_weights`` of vLLM's worker, which also redoes the repacking that CPU
    kernels need; writing to the model's tensors directly would miss that.
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
    ) -> None:
        """Start the engine on the weights of ``model_path``, which count as version 0.

        Args:
            model_path: Hugging Face folder of the starting model.
            expected: name -> shape of every weight that an update must bring.
            config: sampling and sizes; truncated sampling is refused.
            dtype: precision of the weights, the policy's own.
            max_sequence: longest prefix plus continuation, in tokens.
            seed: engine seed; every prompt has its own besides.

        Raises:
            EngineError: sampling is truncated.
            ModelError: vLLM cannot load the folder.
        """
        require_neutral_sampling(config)
        self._temperature = config.temperature
        self._expected = dict(expected)
        with vllm_environment(config.kv_cache_gib) as arguments:
            from vllm import LLM, SamplingParams, TokensPrompt

            if not torch.cuda.is_available():
                arguments["block_size"] = CPU_BLOCK_TOKENS
            try:
                self._llm: Any = LLM(
                    model=str(model_path),
                    dtype="bfloat16" if dtype is Dtype.bf16 else "float32",
                    max_model_len=max_sequence,
                    max_num_seqs=config.max_batch,
                    enable_prefix_caching=True,
                    skip_tokenizer_init=True,
                    seed=seed % 2**31,
                    disable_log_stats=True,
                    **arguments,
                )
                # Some shapes load and fail only when attention runs: find out now, and not after the first data.
                self._llm.generate(
                    [TokensPrompt(prompt_token_ids=[0])], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False
                )
            except (ValueError, OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise ModelError(f"vLLM cannot serve {model_path}: {reason[0]}") from error
        self._stop_tokens = _end_of_sequence(model_path)
        self._version: int | None = 0
        _log.info(
            "rollout sampling: temperature=%g, no top_p / top_k / min_p, generation_config.json not read, "
            "end-of-sequence tokens %s",
            config.temperature,
            self._stop_tokens,
        )

    @property
    def version(self) -> int | None:
        """Policy version of the weights in force; None after an update that failed half-way."""
        return self._version

    def generate(self, prompts: Sequence[Prompt], max_tokens: int, version: int) -> list[Continuation]:
        """See ``RolloutEngine.generate``."""
        from vllm import SamplingParams, TokensPrompt

        self._require_version(version)
        # Blocks left by an earlier call change the shape of the computation, and with it the last bits of the result:
        # a resumed run, whose cache is empty, would not sample what the uninterrupted one did.
        self._drop_prefix_cache()
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
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt.prefix)) for prompt in prompts], parameters, use_tqdm=False
        )
        if len(outputs) != len(prompts):
            raise EngineError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts; start the run again")
        return [self._continuation(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See ``RolloutEngine.update_weights``."""
        self._version = None
        # All of them before the first is handed over: vLLM cannot start anew after a reload that broke off.
        checked = iter(list(self._checked(weights)))
        self._llm.collective_rpc(_reload, args=(checked,))
        for name, _ in checked:  # the loader may stop early; what is left must still be accounted for
            raise EngineError(f"vLLM did not take the weight {name!r}; its model differs from the policy's")
        self._drop_prefix_cache()
        self._version = version

    def _drop_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM refused to drop its prefix cache; what it holds is not of these weights or prompts")

    def _checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        missing = dict(self._expected)
        for name, tensor in weights:
            if name not in missing:
                raise EngineError(f"weight {name!r} was sent twice or is not part of the engine's model")
            shape = missing.pop(name)
            if tuple(tensor.shape) != shape:
                raise EngineError(f"weight {name!r} was sent as {tuple(tensor.shape)}; the engine's is {shape}")
            yield name, tensor
        if missing:
            raise EngineError(f"{len(missing)} weights were not sent, the first is {min(missing)!r}")

    def _require_version(self, version: int) -> None:
        if self._version is None:
            raise EngineError("the last weight update failed, so the engine's weights belong to no version")
        if self._version != version:
            raise EngineError(
                f"rollouts of policy version {version} were asked for, but the engine holds version {self._version}; "
                "update its weights first"
            )

    def _continuation(self, prompt: Prompt, output: Any) -> Continuation:
        if tuple(output.prompt_token_ids) != prompt.prefix:
            raise EngineError("vLLM returned a continuation of another prompt than the one asked for")
        completion = output.outputs[0]
        tokens = tuple(completion.token_ids)
        logprobs = tuple(float(entry[token].logprob) for token, entry in zip(tokens, completion.logprobs, strict=True))
        return Continuation(tokens, logprobs, str(completion.finish_reason))


def start_policy_engine(config: Config) -> VllmEngine:
    """The engine of ``config``, on the weights of ``model.path`` as version 0; raises what ``VllmEngine`` does."""
    folder = Path(config.model.path)
    return VllmEngine(
        folder,
        expected_shapes(read_architecture(folder)),
        config.rollout,
        dtype=config.model.dtype,
        max_sequence=config.max_sequence,
        seed=config.run.seed,
    )


def _reload(worker: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Runs inside vLLM's worker: exchange the weights, and repack an output layer that is tied to the embedding.

    ``reload_weights`` repacks a layer when weights are loaded into it. A tied output layer gets none of its own, so on
    CPU, where the matrix product reads a packed copy, it would go on with the old ones and nothing would say so.
    """
    worker.reload_weights(weights_iterator=weights)
    model = worker.model_runner.get_model()
    head, embedding = model.lm_head, model.model.embed_tokens
    if not torch.cuda.is_available() and head.weight is embedding.weight:
        head.quant_method.process_weights_after_loading(head)


def _end_of_sequence(model_path: Path) -> list[int]:
    """End-of-sequence ids of ``config.json``; without a tokenizer vLLM does not look them up itself."""
    value = json.loads((model_path / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list) else [int(value)]
