"""The label of a rewriter's prompt: the texts, whether the suffix is good, and what reading the answer needs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rlpt.config import PromptLength, Role
from megatron_rlpt.teacher.rewrite_answers import ShownPassage
from megatron_rlpt.teacher.rewrite_prompt import RewritePrompt
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Episode, Failed

GOOD = "good"
"""Kind of a suffix that nothing is wrong with."""
_NO_LABEL = "label of no rewriter's prompt"


@dataclass(frozen=True)
class RewriteLabel:
    """What is known about a passage that a rewriter in training is shown."""

    prefix: str
    suffix: str
    """The passage without its anchor."""
    good: bool
    """Whether to copy it."""
    kind: str
    """What is wrong with it, or ``good``."""
    reference: str
    """The good suffix."""
    anchor: str
    fence: str
    prompt: PromptLength
    document: str = ""

    @staticmethod
    def of(asked: RewritePrompt, prefix: str, suffix: str, reference: str, kind: str, document: str) -> RewriteLabel:
        """Return the label of a prompt; ``kind`` is ``good`` for a suffix to copy."""
        return RewriteLabel(
            prefix, suffix, kind == GOOD, kind, reference, asked.anchor, asked.fence, asked.length, document
        )

    @staticmethod
    def read(label: str) -> RewriteLabel | Failed:
        """Return the label that an episode holds as JSON, or a failure."""
        try:
            found = json.loads(label or "{}")
            if found.pop("role", None) != Role.rewriter:
                return Failed(_NO_LABEL, {"found": label})
            read = RewriteLabel(**found | {"prompt": PromptLength(found.get("prompt"))})
            texts = (read.prefix, read.suffix, read.kind, read.reference, read.anchor, read.fence)
            if not isinstance(read.good, bool) or not all(isinstance(text, str) for text in texts):
                return Failed(_NO_LABEL, {"found": label})
        except (TypeError, ValueError) as error:
            return Failed(_NO_LABEL, {"found": label, "message": str(error)})
        return read

    def as_dict(self) -> dict[str, Any]:
        """Return it as an object of a record."""
        return {"role": Role.rewriter.value, **asdict(self), "prompt": self.prompt.value}

    def shown(self, identity: str, text: TextTokens) -> ShownPassage:
        """Return prefix and suffix as an episode of a run in which the rewriter would serve.

        Args:
            identity: of the episode.
            text: text and tokens of the rewriter.
        """
        prefix = text.continue_with((), self.prefix)
        suffix = text.continue_with(prefix, self.suffix)
        episode = Episode(identity, tuple(prefix), tuple(suffix), "", self.document, len(prefix))
        return ShownPassage(episode, self.prefix, self.suffix, RewritePrompt("", self.anchor, self.fence, self.prompt))
