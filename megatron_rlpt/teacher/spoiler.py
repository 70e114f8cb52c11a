"""The spoiler: a teacher makes a good suffix worse, so that a judge in training sees faults that no rule makes.

The paper spoils suffixes by a 70B model (section on training the judge). The prompt asks for one fault at a time, drawn
per suffix, since a model that may choose always chooses the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlpt.config import PromptLength, RewriterConfig
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.teacher.prompts import build_prompt
from megatron_rlpt.teacher.rewrite_answers import RewriteReader, ShownPassage
from megatron_rlpt.teacher.rewrite_prompt import RewritePrompt, anchor_of
from megatron_rlpt.teacher.rewriter import most_tokens
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import Episode, Failed, derive_seed

WAYS = (
    "it loses the thread and drifts to another subject",
    "it contradicts what the beginning says, or itself",
    "it goes round in circles and says the same again in other words",
    "its facts are wrong: names, numbers, causes or dates that do not fit",
    "it is badly written: clumsy, vague and full of empty phrases",
)
"""What may be wrong with a spoiled suffix. A change of wording needs a new version of the prompt ``spoil``."""
_FEWEST = 0.5
"""Share of the suffix's tokens that a spoiled one has at least."""


class Spoiler:
    """Asks for spoiled suffixes and reads them."""

    def __init__(self, text: TextTokens, config: RewriterConfig, seed: int, control_tokens: Sequence[str] = ()) -> None:
        """
        Args:
            text: converts between text and tokens of the policy.
            config: anchor words and sampling, as for a rewrite.
            seed: of requests and of the choice of faults.
            control_tokens: the teacher's, to break up in texts that it sees.
        """
        self._text, self._config, self._seed = text, config, seed
        self._reader = RewriteReader(text, control_tokens)

    def request(self, episode: Episode) -> Request:
        """Return the question about an episode's suffix."""
        shown = self._shown(episode)
        passage, length = shown.prompt.anchor + shown.suffix, len(episode.suffix)
        return Request(
            prompt=(Message("user", shown.prompt.text),),
            seed=derive_seed(self._seed, episode.id, "spoil"),
            max_tokens=min(4 * length + 64, max(2 * length, most_tokens(passage))),
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            answer_start=shown.prompt.answer_start,
            episode=episode.id,
        )

    def read(self, reply: Reply, episode: Episode) -> tuple[int, ...] | Failed:
        """Return the tokens of the spoiled suffix, at most as many as the suffix has, or why there are none."""
        tokens = self._reader.passage(reply, self._shown(episode))
        if isinstance(tokens, Failed):
            return tokens
        kept = tuple(tokens[: len(episode.suffix)])
        kept = kept[: self._text.whole_characters(kept, episode.prefix)]
        if kept == episode.suffix[: len(kept)]:
            return Failed("nothing is spoiled", {"reply": reply.text})
        if len(kept) < _FEWEST * len(episode.suffix) or self._text.is_blank(kept):
            return Failed("spoiled suffix too short", {"reply": reply.text})
        return kept

    def _shown(self, episode: Episode) -> ShownPassage:
        prefix, suffix = prefix_text(self._text, episode), self._text.text_of(episode.suffix, episode.prefix)
        anchor = anchor_of(prefix, self._config.anchor_words)
        way = WAYS[derive_seed(self._seed, episode.id, "way") % len(WAYS)]
        fence = derive_seed(self._seed, episode.id)
        prompt = build_prompt("spoil", fence, prefix=prefix, passage=anchor + suffix, way=way)
        return ShownPassage(
            episode, prefix, suffix, RewritePrompt(prompt.text, anchor, prompt.fence, PromptLength.full)
        )
