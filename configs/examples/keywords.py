"""A judge: counts wanted and unwanted words, and explains every reward. Asks no teacher."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_rlpt.config.judges import JudgeFacts
from megatron_rlpt.teacher.generator import Ask
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import BLANK, Candidate, Failed, Group, Reward


class Keywords:
    """Reward the share of words that are wanted, minus the share of unwanted ones."""

    version = "1"
    facts = JudgeFacts()  # asks nothing; JudgeFacts(asks=TeacherUse.text) may ask the teacher through ``ask``

    def __init__(self, tokenizer: TextTokens, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer  # given by the run, as is ``seed``
        self.wanted, self.unwanted = set(wanted), set(unwanted)

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with one ``Reward`` or ``Failed`` per candidate."""
        rewards = [self._reward(group.episode.prefix, candidate) for candidate in group.candidates]
        return replace(group, rewards=tuple(rewards))

    def _reward(self, prefix: Sequence[int], candidate: Candidate) -> Reward | Failed:
        if candidate.blank:
            return BLANK
        words = self.tokenizer.text_of(candidate.tokens, prefix).lower().split()
        if not words:
            return Failed("no words")
        good, bad = sum(word in self.wanted for word in words), sum(word in self.unwanted for word in words)
        detail = {"wanted": good, "unwanted": bad, "words": len(words)}
        return Reward((good - bad) / len(words), "keywords", self.version, detail)
