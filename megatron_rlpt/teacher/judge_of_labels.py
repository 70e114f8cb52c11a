"""What labels alone say about answers, for runs without a judge, such as a supervised start."""

from __future__ import annotations

import json
from collections.abc import Sequence

from typing_extensions import override

from megatron_rlpt.config import Role
from megatron_rlpt.teacher.good_rewrite import RewriteForm
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.right_verdict import RightVerdict
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Group


class JudgeOfLabels(Judge):
    """Compares verdicts with the labels of a judge's prompts, and rewrites with those of a rewriter's."""

    def __init__(self, text: TextTokens, control_tokens: Sequence[str] = ()) -> None:
        """
        Args:
            text: text and tokens of the model in training.
            control_tokens: of the model in training.
        """
        self._verdicts = RightVerdict(text)
        self._rewrites = RewriteForm(text, control_tokens)

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        return [(self._rewrites if _of_rewriter(group) else self._verdicts).judge([group])[0] for group in groups]


def _of_rewriter(group: Group) -> bool:
    label = json.loads(group.episode.label or "{}")
    return label.get("role") == Role.rewriter
