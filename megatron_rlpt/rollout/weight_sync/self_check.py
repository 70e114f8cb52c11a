"""Start-up proof that a weight update leaves the engine with exactly the weights that were sent.

Engine and policy have loaded the same model from disk. The engine's weights are replaced by random values and then by
the policy's, both through the transport of every later update. After the first, every weight must have changed; after
the second, every weight must equal its start value bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rlpt.errors import EngineError
from megatron_rlpt.rollout.vllm.runtime import generate_in_one_batch

_PROBES = 4
_PROBE_TOKENS = 96
"""Length of the longest probe: three blocks of the prefix cache on CPU."""
_CONTINUATION = 4


Answer = tuple[tuple[int, ...], tuple[float, ...]]
"""Greedy tokens and their log-probabilities (nats)."""


@dataclass(frozen=True)
class EngineState:
    """Digests of an engine's weights and buffers, and its answers to the probes."""

    weights: dict[str, str]
    """Name -> digest; with several workers, the name includes the worker."""
    buffers: dict[str, str]
    """The same for tensors that are not trained, such as rotary tables."""
    answers: dict[str, Answer]
    """Answers by probe."""


def probe_prompts(vocab: int, max_sequence: int) -> list[list[int]]:
    """Return a fixed batch of prompts, as long as ``max_sequence`` and ``_PROBE_TOKENS`` allow."""
    draw = random.Random(0)
    length = max(1, min(max_sequence - _CONTINUATION, _PROBE_TOKENS))
    return [[draw.randrange(vocab) for _ in range(max(1, length - index))] for index in range(_PROBES)]


def engine_state(llm: Any, prompts: Sequence[Sequence[int]], salt: str) -> EngineState:
    """Return the state of ``llm``; prefixes still cached under the same ``salt`` are used."""
    weights = _by_worker(llm.collective_rpc("rlpt_weight_digests"))
    return EngineState(weights, buffer_digests(llm), probe_answers(llm, prompts, salt))


def buffer_digests(llm: Any) -> dict[str, str]:
    """Return name -> digest of every tensor that is not trained."""
    return _by_worker(llm.collective_rpc("rlpt_buffer_digests"))


def probe_answers(llm: Any, prompts: Sequence[Sequence[int]], salt: str) -> dict[str, Answer]:
    """Return greedy continuations of ``prompts``; for ``salt`` see ``engine_state``."""
    from vllm import SamplingParams, TokensPrompt

    greedy = SamplingParams(temperature=0.0, max_tokens=_CONTINUATION, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = generate_in_one_batch(
        llm,
        [TokensPrompt(prompt_token_ids=list(prompt), cache_salt=salt) for prompt in prompts],
        [greedy] * len(prompts),
    )
    answers = {}
    for index, output in enumerate(outputs):
        completion = output.outputs[0]
        tokens = tuple(completion.token_ids)
        values = tuple(entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True))
        answers[f"log-probabilities of probe {index}"] = (tokens, values)
    return answers


def require_all_changed(loaded: EngineState, randomised: EngineState) -> None:
    """Require that random weights changed every weight and every answer.

    Raises:
        EngineError: names the weights that an update does not reach.
    """
    same = [name for name, digest in loaded.weights.items() if randomised.weights[name] == digest]
    same += [name for name, answer in loaded.answers.items() if randomised.answers[name] == answer]
    if same:
        raise EngineError(
            f"a weight update does not reach {_listed(same)} of the rollout engine, which would keep old values; use "
            "another version of vLLM for this model"
        )


def require_restored(loaded: EngineState, synced: EngineState) -> None:
    """Require that the starting model's weights restored everything that was loaded from disk.

    Raises:
        EngineError: names the tensors that differ.
    """
    for what, first, last in (
        ("weights", loaded.weights, synced.weights),
        ("buffers", loaded.buffers, synced.buffers),
    ):
        if differing := [name for name, digest in first.items() if last[name] != digest]:
            raise EngineError(
                f"after a weight update {what} of the rollout engine differ from the model's folder: "
                f"{_listed(differing)}; policy and engine do not hold the same model"
            )
    if differing := [name for name, answer in loaded.answers.items() if synced.answers[name] != answer]:
        raise EngineError(
            f"after a weight update the rollout engine holds the right weights but answers otherwise ({differing[0]}); "
            "its cache holds results of other weights"
        )


def _by_worker(digests: list[dict[str, str]]) -> dict[str, str]:
    if len(digests) == 1:
        return digests[0]
    return {f"worker {index}: {name}": value for index, own in enumerate(digests) for name, value in own.items()}


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
