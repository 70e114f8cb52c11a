"""The words of the design as data: episode, candidate, score, group.

Everything that flows between stream, engine, teacher and objective is one of these. They are immutable and plain
(ints, strings, tuples), so that they can be written to disk, sent to another machine and read back equal.
Token ids are the truth; text exists for the teacher only.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_rlpt.plain_text import one_line


class Source(enum.StrEnum):
    """Where a candidate comes from."""

    ORIGINAL = "original"
    REWRITE = "rewrite"
    ROLLOUT = "rollout"


@dataclass(frozen=True)
class Episode:
    """One prefix and the original suffix that follows it in a document.

    ``prefix`` has between 1 and ``data.max_prefix`` tokens, ``suffix`` has ``data.suffix_length``, or up to
    three less where it would end inside a character.
    """

    id: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    corpus: str
    """Name of the data source."""
    document: str
    """Document id within the source (path and record number)."""
    offset: int
    """Index of the first suffix token within the tokenized document."""


@dataclass(frozen=True)
class Candidate:
    """A token sequence proposed as continuation of an episode's prefix."""

    source: Source
    tokens: tuple[int, ...]
    policy_version: int | None = None
    """Number of optimizer updates behind the weights that produced a rollout; None for original and rewrite."""
    seed: int | None = None
    """Sampling seed of a rollout or a rewrite."""
    finish_reason: str | None = None
    """``length`` or ``stop`` (end-of-sequence token sampled), for generated candidates."""
    logprobs: tuple[float, ...] | None = None
    """The engine's own log-probability of every token, natural log, for rollouts."""
    blank: bool = False
    """Without any text: control tokens and white space only. Never judged and never chosen."""


@dataclass(frozen=True)
class Reward:
    """A verdict the judge gave; higher is better. ``detail`` holds what is needed to explain and replay it."""

    value: float
    judge: str
    prompt_version: str
    detail: dict[str, Any] = field(default_factory=dict)
    """JSON-serialisable: parts of the score by axis, raw replies, parsed verdicts."""


@dataclass(frozen=True)
class Failed:
    """The absence of a score. Never a number: a failed candidate is in no pair, no target and no mean."""

    reason: str
    detail: dict[str, Any] = field(default_factory=dict)
    """JSON-serialisable. ``cause`` is what was said where it went wrong first, ``root`` the reason that was given
    there, where it is another one."""

    @property
    def root(self) -> str:
        """The reason that was given first, one of few."""
        root = self.detail.get("root")
        return root if isinstance(root, str) and root else self.reason

    @property
    def explained(self) -> str:
        """All reasons from the reward back to the first cause, in one line."""
        parts = [self.reason, self.root if self.root not in self.reason else "", str(self.detail.get("cause") or "")]
        return one_line(": ".join(part for part in parts if part))

    def because_of(self, first: Failed) -> Failed:
        """This failure, as one that another led to."""
        cause = {"cause": first.detail["cause"]} if first.detail.get("cause") else {}
        root = {"root": first.root} if first.root != self.reason else {}
        return Failed(self.reason, self.detail | root | cause)


@dataclass(frozen=True)
class Cost:
    """What judging a group took from the teacher."""

    calls: int
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    """From the first question to the last answer, waiting for other groups included."""


@dataclass(frozen=True)
class Group:
    """An episode with its candidates and, once judged, one reward per candidate (same order)."""

    episode: Episode
    candidates: tuple[Candidate, ...]
    rewards: tuple[Reward | Failed, ...] = ()
    rewrite_failure: Failed | None = None
    """Why the group has no rewrite, where one was asked for."""
    cost: Cost | None = field(default=None, compare=False)
    """None without a prompted judge. Groups with the same rewards are equal, however long it took."""

    def rewarded(self) -> list[tuple[Candidate, Reward]]:
        """Candidates that have a score, in candidate order."""
        return [
            (candidate, reward)
            for candidate, reward in zip(self.candidates, self.rewards, strict=True)
            if isinstance(reward, Reward)
        ]


BLANK = Failed("empty candidate")
"""Reward of a blank candidate."""


def without_stale(group: Group, version: int, bound: int) -> Group:
    """``group`` with rollouts more than ``bound`` updates older than ``version`` as failures; the rest never goes bad.

    Old rollouts are not what the policy of today would say, so nothing should be learnt from how they rank.
    """
    rewards = list(group.rewards)
    for index, candidate in enumerate(group.candidates):
        if candidate.policy_version is not None and version - candidate.policy_version > bound:
            detail = {"rollout_version": candidate.policy_version, "version": version, "bound": bound}
            rewards[index] = Failed("stale rollout", detail)
    return replace(group, rewards=tuple(rewards)) if group.rewards else group


SEED_RANGE = 1 << 63
"""``derive_seed`` returns values below this."""


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on ``PYTHONHASHSEED``)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stable_id(*parts: object) -> str:
    """A 16-hex-digit id that depends on every part and on nothing else."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
