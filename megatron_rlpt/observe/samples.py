"""A few episodes of every step in full, to read what the policy learned from and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rlpt.observe.jsonl import JsonLines
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward

Selection = Mapping[str, tuple[int | None, int | None, str | None]]
"""Episode id -> (index of the chosen candidate, index of the rejected one, reason for skipping the episode)."""


class SampleTable:
    """``samples.jsonl``: one line per episode with prefix, candidates, verdicts and what was chosen.

    Args:
        path: ``<run.dir>/samples.jsonl``.
        per_step: episodes written per step; 0 writes none.
        text: converts the policy's tokens to text.
        start: next step of the run; lines of this step and later are dropped.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path, per_step: int, text: TextTokens, start: int = 0) -> None:
        self._per_step = per_step
        self._text = text
        self._lines = JsonLines(path, start)

    def write(self, step: int, groups: Sequence[Group], selection: Selection) -> None:
        """Append the first ``per_step`` groups of a step.

        Each line has ``skipped_in_step``: reason -> number of the step's episodes skipped for it.

        Raises:
            ValueError: an episode is not in ``selection``, or one of its indices is out of range.
        """
        skipped = Counter(reason for _, _, reason in selection.values() if reason is not None)
        for group in groups[: self._per_step]:
            self._lines.write({"step": step, **self._row(group, selection), "skipped_in_step": dict(skipped)})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> SampleTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _row(self, group: Group, selection: Selection) -> dict[str, Any]:
        episode = group.episode
        if episode.id not in selection:
            raise ValueError(f"episode {episode.id} is not in the selection")
        chosen, rejected, skipped = selection[episode.id]
        for index in (chosen, rejected):
            if index is not None and not 0 <= index < len(group.candidates):
                raise ValueError(f"episode {episode.id}: index {index} selected of {len(group.candidates)} candidates")
        # In next-token training groups have no rewards.
        rewards: Sequence[Reward | Failed | None] = group.rewards or [None] * len(group.candidates)
        return {
            "episode": episode.id,
            "corpus": episode.corpus,
            "document": episode.document,
            "offset": episode.offset,
            "prefix": prefix_text(self._text, episode),
            "candidates": [
                {**self._describe(candidate, episode), **_verdict(reward)}
                for candidate, reward in zip(group.candidates, rewards, strict=True)
            ],
            "chosen": chosen,
            "rejected": rejected,
            "skipped": skipped,
        } | ({"rewrite": _verdict(group.rewrite_failure)} if group.rewrite_failure else {})

    def _describe(self, candidate: Candidate, episode: Episode) -> dict[str, Any]:
        return {
            "source": candidate.source.value,
            "text": self._text.text_of(candidate.tokens, episode.prefix),
            "version": candidate.policy_version,
            "seed": candidate.seed,
            "finish_reason": candidate.finish_reason,
        }


def _verdict(reward: Reward | Failed | None) -> dict[str, Any]:
    if reward is None:
        return {}
    if isinstance(reward, Failed):
        return {"failed": reward.reason, "detail": reward.detail}
    return {
        "value": reward.value,
        "judge": reward.judge,
        "prompt_version": reward.prompt_version,
        "detail": reward.detail,
    }
