"""The protocol of rollout engines, the checks they share, and the step from rollouts to candidates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from megatron_rlpt.errors import EngineError
from megatron_rlpt.types import Candidate, Episode, Routing, Source, derive_seed


@dataclass(frozen=True)
class RolloutPrompt:
    """A request for one continuation. The same prompt under the same weights gives the same tokens."""

    prefix: tuple[int, ...]
    seed: int
    greedy: bool = False
    """Always take the most likely token; the seed then has no effect."""


@dataclass(frozen=True)
class Continuation:
    """A generated continuation: token ids, the log-probability of each (nats), and why it stopped."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    """``length`` (all requested tokens) or ``stop`` (the last token is end-of-sequence)."""
    routing: Routing | None = None
    """The experts of prefix and tokens, with ``rollout.router_replay``."""


class RolloutEngine(Protocol):
    """Generates continuations under the policy's weights of a known version."""

    @property
    def version(self) -> int | None:
        """Policy version of the engine's weights; None after a failed update."""
        ...

    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        """Generate one continuation per prompt, in order, of ``max_tokens`` tokens or up to end-of-sequence.

        Raises:
            EngineError: the engine's weights are not those of ``version``.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by the policy's (Hugging Face names) and drop everything cached under the old ones.

        Raises:
            EngineError: names or shapes differ from the engine's model, or the cache was not dropped. The engine then
                refuses to generate until an update succeeds.
        """
        ...


def sample_rollouts(
    engine: RolloutEngine,
    episodes: Sequence[Episode],
    counts: Sequence[int],
    max_tokens: int,
    version: int,
    run_seed: int,
) -> list[list[Candidate]]:
    """Sample ``counts`` rollouts of each episode under the policy of ``version``.

    The seed of rollout k depends only on the run seed, the episode and k, so a resumed run draws the same tokens.

    Raises:
        EngineError: the engine holds another version, or did not answer every prompt.
    """
    seeds = [
        [derive_seed(run_seed, episode.id, k) for k in range(count)]
        for episode, count in zip(episodes, counts, strict=True)
    ]
    prompts = [
        RolloutPrompt(episode.prefix, seed) for episode, own in zip(episodes, seeds, strict=True) for seed in own
    ]
    generated = engine.generate(prompts, max_tokens, version)
    if len(generated) != len(prompts):
        raise EngineError(f"the engine answered {len(generated)} of {len(prompts)} prompts; run the same command again")
    continuations = iter(generated)
    return [
        [
            Candidate(
                source=Source.ROLLOUT,
                tokens=continuation.tokens,
                policy_version=version,
                seed=seed,
                finish_reason=continuation.finish_reason,
                logprobs=continuation.logprobs,
                routing=continuation.routing,
            )
            for seed, continuation in zip(own, shared_prefix([next(continuations) for _ in own]), strict=True)
        ]
        for own in seeds
    ]


def shared_prefix(rollouts: Sequence[Continuation]) -> list[Continuation]:
    """Give all rollouts of an episode the first one's record of the prefix.

    An update computes the prefix once, so it can follow one record only. They hardly differ: an engine computes most of
    the prefix once as well.
    """
    first = rollouts[0].routing if rollouts else None
    if first is None:
        return list(rollouts)
    return [replace(one, routing=replace(one.routing, prefix=first.prefix)) if one.routing else one for one in rollouts]


def require_version(held: int | None, requested: int) -> None:
    """Refuse to generate under weights of another version than ``requested``.

    Raises:
        EngineError: the engine holds another version, or none after a failed update.
    """
    if held is None:
        raise EngineError(
            "the last weight update failed, so the engine's weights belong to no version; update them again"
        )
    if held != requested:
        raise EngineError(
            f"rollouts of policy version {requested} were requested, but the engine holds version {held}; "
            "update its weights first"
        )


def end_of_sequence(model_path: Path) -> list[int]:
    """Return the end-of-sequence token ids in ``config.json`` of a Hugging Face folder; there may be none.

    An engine without a tokenizer does not look them up itself.
    """
    value = json.loads((model_path / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list) else [int(value)]
