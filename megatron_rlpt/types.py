"""The data that flows between stream, engine, teacher and objective: episodes, candidates, rewards, groups.

All types are immutable and plain (ints, strings, bytes, tuples), so that they can be stored, sent to another machine
and read back unchanged. Candidates are token ids; only the teacher uses their text.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_rlpt.plain_text import one_line


class Source(enum.StrEnum):
    """The origin of a candidate."""

    ORIGINAL = "original"
    REWRITE = "rewrite"
    ROLLOUT = "rollout"


@dataclass(frozen=True)
class Episode:
    """One prefix and the original suffix that follows it in a document.

    ``prefix`` has 1 to ``data.max_prefix`` tokens. ``suffix`` has ``data.suffix_length`` tokens, or up to three fewer
    if it would end inside a character.
    """

    id: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    corpus: str
    """Name of the data source."""
    document: str
    """Id of the document within the source (path and record number)."""
    offset: int
    """Index of the first suffix token within the tokenized document."""
    label: str = ""
    """For a prompt: what is known about the right answer, as a JSON object. The prefix is then the prompt, and the
    suffix a right answer with its end token, or empty."""


@dataclass(frozen=True)
class Routing:
    """The experts that a rollout engine sent the tokens of a sequence to, in every layer of a mixture of experts.

    ``prefix`` and ``completion`` are a row of [layers, per_token] expert numbers for every token from the first on, in
    ``width`` bytes each (little-endian). The last token of a completion was sampled and never computed, so it has none.
    """

    prefix: bytes = field(repr=False)
    """The rollouts of a group hold the same object: an update computes their prefix once."""
    completion: bytes = field(repr=False)
    layers: int
    per_token: int
    width: int
    """1 or 2."""

    @property
    def row(self) -> int:
        """Bytes of a token."""
        return self.layers * self.per_token * self.width

    def cut(self, tokens: int) -> Routing:
        """Return the record of the first ``tokens`` tokens of the completion."""
        return replace(self, completion=self.completion[: tokens * self.row])


@dataclass(frozen=True)
class Candidate:
    """A token sequence that may continue an episode's prefix."""

    source: Source
    tokens: tuple[int, ...]
    policy_version: int | None = None
    """Optimizer updates of the weights that generated a rollout; None for original and rewrite."""
    seed: int | None = None
    """Sampling seed of a rollout or a rewrite."""
    finish_reason: str | None = None
    """``length`` or ``stop`` (sampled end-of-sequence), for generated candidates."""
    logprobs: tuple[float, ...] | None = None
    """Natural log-probability of every token as the engine computed it, for rollouts."""
    blank: bool = False
    """Whether there is no text, only control tokens and white space. Blank candidates are never judged or chosen."""
    routing: Routing | None = None
    """The experts of prefix and tokens, for rollouts with ``rollout.router_replay``."""


@dataclass(frozen=True)
class Reward:
    """The reward of one candidate; higher is better. ``detail`` explains it and allows replaying the judgment."""

    value: float
    judge: str
    prompt_version: str
    detail: dict[str, Any] = field(default_factory=dict)
    """JSON-serializable: values by axis, raw replies, parsed verdicts."""


@dataclass(frozen=True)
class Failed:
    """The absence of a reward. A failed candidate is in no pair, no target and no mean."""

    reason: str
    detail: dict[str, Any] = field(default_factory=dict)
    """JSON-serializable. ``cause`` is the message of the first error; ``root`` is its reason, if that differs."""

    @property
    def root(self) -> str:
        """The reason of the first error, from a fixed set."""
        root = self.detail.get("root")
        return root if isinstance(root, str) and root else self.reason

    @property
    def explained(self) -> str:
        """All reasons, back to the first cause, in one line."""
        parts = [self.reason, self.root if self.root not in self.reason else "", str(self.detail.get("cause") or "")]
        return one_line(": ".join(part for part in parts if part))

    def because_of(self, first: Failed) -> Failed:
        """Return this failure with the cause and root of an earlier one."""
        cause = {"cause": first.detail["cause"]} if first.detail.get("cause") else {}
        root = {"root": first.root} if first.root != self.reason else {}
        return Failed(self.reason, self.detail | root | cause)


@dataclass(frozen=True)
class Cost:
    """The teacher's cost of judging a group."""

    calls: int
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    """Time from the first question to the last answer, including waits for other groups."""
    cached_tokens: int | None = None
    """Prompt tokens that servers took from their prefix caches; None if no server tells."""


@dataclass(frozen=True)
class Group:
    """An episode with its candidates and, once judged, one reward per candidate (same order)."""

    episode: Episode
    candidates: tuple[Candidate, ...]
    rewards: tuple[Reward | Failed, ...] = ()
    rewrite_failure: Failed | None = None
    """Why the group lacks a requested rewrite."""
    cost: Cost | None = field(default=None, compare=False)
    """None without a prompted judge. The cost does not count for equality of groups."""

    def rewarded(self) -> list[tuple[Candidate, Reward]]:
        """Return the candidates that have a reward, in candidate order."""
        return [
            (candidate, reward)
            for candidate, reward in zip(self.candidates, self.rewards, strict=True)
            if isinstance(reward, Reward)
        ]


BLANK = Failed("empty candidate")
"""The failure of blank candidates."""


def without_stale(group: Group, version: int, bound: int) -> Group:
    """Mark rollouts that are more than ``bound`` updates older than ``version`` as failed.

    They are off-policy: the current policy would not generate them, so it must not learn from their ranks.
    """
    rewards = list(group.rewards)
    for index, candidate in enumerate(group.candidates):
        if candidate.policy_version is not None and version - candidate.policy_version > bound:
            detail = {"rollout_version": candidate.policy_version, "version": version, "bound": bound}
            rewards[index] = Failed("stale rollout", detail)
    return replace(group, rewards=tuple(rewards)) if group.rewards else group


SEED_RANGE = 1 << 63
"""Exclusive upper bound of ``derive_seed``."""


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends only on the parts (not on ``PYTHONHASHSEED``)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stable_id(*parts: object) -> str:
    """Return an id of 16 hex digits that depends only on the parts."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
