"""The teacher's text generator: vLLM's offline engine, in this process or a separate one, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Dtype
from megatron_rlpt.errors import ModelError, first_line
from megatron_rlpt.models.adapters import Adapter, read_adapter
from megatron_rlpt.rollout.placement import IN_THIS_PROCESS, EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm.process import EngineProcess
from megatron_rlpt.rollout.vllm.runtime import generate_in_one_batch, vllm_environment
from megatron_rlpt.rollout.vllm.worker import EXTENSION
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.tokens.chat_tokenizer import ChatTokenizer
from megatron_rlpt.types import Failed

_NO_CHAT = (
    "cannot judge or rewrite by prompt; set {key} to a post-trained (instruct) model, or use "
    "teacher.judge=likelihood and candidates.rewrite=false"
)


class VllmGenerator:
    """Serves requests with vLLM's offline engine; per-request seeds make replies reproducible.

    With an engine in a separate process, answers with a JSON Schema are reproducible only up to rounding, because
    timing decides there which of them share a batch.
    """

    def __init__(
        self,
        model_path: str | Path,
        max_context: int,
        kv_cache_gib: float,
        *,
        in_process: bool = True,
        dtype: Dtype = Dtype.fp32,
        key: str = "teacher.path",
        context_key: str = "teacher.max_context",
    ) -> None:
        """Start the engine (about 15 s for 135M parameters on a CPU).

        Args:
            model_path: local Hugging Face folder with a chat template, or a LoRA adapter for one.
            max_context: maximum length of prompt plus answer in tokens.
            kv_cache_gib: memory for the key-value cache in GiB.
            in_process: False in a ``torch.distributed`` world of more than one rank, where vLLM needs a separate
                process.
            dtype: fp32, or bf16 for the precision that vLLM chooses by the checkpoint.
            key: configuration key that names the folder, for errors.
            context_key: configuration key of ``max_context``, for errors.

        Raises:
            ModelError: the folder is missing, has no chat template, or vLLM cannot serve it.
        """
        path = Path(model_path)
        adapter = read_adapter(path)
        whole = adapter.base if adapter else path
        if not (whole / "config.json").is_file():
            raise ModelError(f"{key} is {path}; it needs to be a local Hugging Face folder with a config.json")
        self._name = path.name
        self._max_context = max_context
        self._too_long = f"prompt too long for {context_key}"
        self._adapter = adapter
        self._tokenizer = ChatTokenizer(whole, _NO_CHAT.format(key=key))
        try:
            self._engine = _start(whole, max_context, kv_cache_gib, in_process, dtype, adapter)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"vLLM cannot serve the teacher {path} with {context_key} = {max_context} and "
                f"teacher.kv_cache_gib = {kv_cache_gib:g}: {first_line(error)}"
            ) from error
        self._process = None if in_process else EngineProcess(self._engine, "the teacher's engine")
        if in_process:
            _compile_grammars_synchronously(self._engine)

    @property
    def name(self) -> str:
        """Name of the model folder."""
        return self._name

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        """Return one reply per request, in order; a prompt that leaves no room for its answer is a ``Failed``.

        Raises:
            ValueError: a message list is empty or a sampling setting is out of vLLM's range.
            EngineError: the engine's process ended.
        """
        with self._process.calling() if self._process else contextlib.nullcontext():
            return self._generate(requests)

    def _tokens(self, request: Request) -> list[int] | Failed:
        """Return the token ids of the request's prompt, or a failure."""
        turns = [(message.role, message.content) for message in request.prompt if isinstance(message, Message)]
        if turns:
            return self._tokenizer.encode(turns, request.answer_start)
        return [token for token in request.prompt if isinstance(token, int)]

    def _generate(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        from vllm.inputs import TokensPrompt

        # Cached blocks of earlier calls change the shape of the computation and so the last bits of the result. A
        # resumed run would then differ from an uninterrupted one.
        self._engine.reset_prefix_cache()
        results: list[Reply | Failed] = [Failed("not generated")] * len(requests)
        prompts, settings, indices = [], [], []
        for index, request in enumerate(requests):
            tokens = self._tokens(request)
            if isinstance(tokens, Failed):
                results[index] = tokens
            elif not tokens:
                results[index] = Failed("empty prompt")
            elif len(tokens) + request.max_tokens > self._max_context:
                results[index] = Failed(
                    self._too_long,
                    {"prompt": len(tokens), "max_tokens": request.max_tokens, "max_context": self._max_context},
                )
            else:
                indices.append(index)
                prompts.append(TokensPrompt(prompt_token_ids=tokens))
                settings.append(_sampling(request))
        if prompts:
            outputs = generate_in_one_batch(self._engine, prompts, settings, **_with_adapter(self._adapter))
            for index, output in zip(indices, outputs, strict=True):
                answer = output.outputs[0]
                results[index] = Reply(
                    answer.text,
                    tuple(answer.token_ids),
                    str(answer.finish_reason),
                    prompt_tokens=len(output.prompt_token_ids),
                    cached_tokens=output.num_cached_tokens,
                    alternatives=_alternatives(answer.logprobs) if requests[index].alternatives else (),
                )
        return results


def _compile_grammars_synchronously(engine: Any) -> None:
    """Schedule answers with a JSON Schema like all others.

    vLLM compiles grammars in a thread and leaves a request out of its batches until its grammar is ready. Batches, and
    so the last bits of the result, would then depend on timing (vllm/v1/structured_output/__init__.py: grammar_init).
    """
    engine.llm_engine.engine_core.engine_core.structured_output_manager._use_async_grammar_compilation = False


def _alternatives(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """Return text and log-probability of the first token's alternatives, the most probable first."""
    found = sorted(logprobs[0].values(), key=lambda one: -one.logprob) if logprobs else []
    return tuple((one.decoded_token or "", float(one.logprob)) for one in found)


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        logprobs=request.alternatives or None,
        structured_outputs=StructuredOutputsParams(json=request.json_schema) if request.json_schema else None,
    )


def _with_adapter(adapter: Adapter | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    from vllm.lora.request import LoRARequest

    return {"lora_request": LoRARequest(adapter.name, 1, str(adapter.folder))}


def _start(
    path: Path, max_context: int, kv_cache_gib: float, in_process: bool, dtype: Dtype, adapter: Adapter | None
) -> Any:
    place = IN_THIS_PROCESS if in_process else EnginePlace(EngineMode.OWN_PROCESS)
    with vllm_environment(kv_cache_gib, place) as arguments:
        from vllm import LLM

        return LLM(
            model=str(path),
            dtype="float32" if dtype is Dtype.fp32 else "auto",
            max_model_len=max_context,
            disable_log_stats=True,
            trust_remote_code=False,
            worker_extension_cls=EXTENSION,
            **({"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter.room} if adapter else {}),
            **arguments,
        )
