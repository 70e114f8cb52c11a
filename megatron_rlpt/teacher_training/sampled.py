"""Pairs of texts that the policy writes: what a judge is asked about while the policy trains.

A text that a rule has spoiled has one fault, and the other one none. Of two texts of a policy each has faults of its
own, so a judge that knows every rule may still be near chance on them. In a world the exact measures tell the better
one. Elsewhere that is the document's own text.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from megatron_rlpt.config import Config
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair
from megatron_rlpt.evaluation.prompt_sets import text_episode
from megatron_rlpt.evaluation.prompts import TextPrompt
from megatron_rlpt.observe import get_logger
from megatron_rlpt.rollout.engine import RolloutEngine, sample_rollouts
from megatron_rlpt.rollout.placement import place_engines
from megatron_rlpt.teacher_training.request import SAMPLED
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, prefix_text
from megatron_rlpt.types import Episode, derive_seed
from megatron_rlpt.world.corruptions import insulted
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import text_of, words_of
from megatron_rlpt.world.measures import Measures, measure_text

_log = get_logger(__name__)

_SAMPLES = 4
"""Texts of the policy after each prefix."""
_PAIRS = 2
"""Most pairs of a prefix."""
_AT_ONCE = 64
"""Prefixes per call of the engine."""
_LEAST = 0.1
"""Difference of quality from which one of two texts is the better one."""


@dataclass(frozen=True)
class PolicySamples:
    """Lets the policy of ``model.path`` continue prefixes with the run's own engine."""

    config: Config
    tokenizer: PolicyTokenizer
    seed: int
    world: World | None = None
    """Tells the better of two texts."""
    insults: bool = False
    """Whether every other prefix is that of an unsafe document; of a world only."""

    def pairs(self, episodes: Sequence[Episode], count: int) -> list[LabelledPair]:
        """Return ``count`` pairs, or fewer if the episodes do not give as many.

        Args:
            episodes: prefixes with the documents' own continuations, whose lengths the policy's texts get.
            count: pairs.

        Raises:
            ConfigError: the GPUs of this machine do not hold an engine of ``rollout``.
            ModelError, EngineError: the policy cannot be served.
        """
        from megatron_rlpt.rollout.vllm.engine import start_policy_engine

        place = place_engines(self.config, rank=0, world=1).own
        assert place is not None  # one rank takes part in the only engine
        engine: RolloutEngine | None = start_policy_engine(self.config, place)
        found: list[LabelledPair] = []
        asked = 0
        for start in range(0, len(episodes), _AT_ONCE):
            if engine is None or len(found) >= count:
                break
            some = [self._begun(one, start + number) for number, one in enumerate(episodes[start : start + _AT_ONCE])]
            asked += len(some)
            length = max(len(one.suffix) for one in some)
            written = sample_rollouts(engine, some, [_SAMPLES] * len(some), length, 0, self.seed)
            for episode, candidates in zip(some, written, strict=True):
                found += self._of_episode(episode, [one.tokens for one in candidates])
        engine = None
        gc.collect()  # an engine gives its memory back when nothing refers to it
        _log.info("sampled from the policy", prefixes=asked, pairs=len(found[:count]))
        return found[:count]

    def _begun(self, episode: Episode, number: int) -> Episode:
        """Return the episode, or for every other one with ``insults`` the same after an unsafe prefix."""
        if self.world is None or not self.insults or number % 2 == 0:
            return episode
        begun = text_of(insulted(self.world, words_of(prefix_text(self.tokenizer, episode)), self.seed))
        cut = text_episode(TextPrompt(episode.document, begun), episode.corpus, self.config, self.tokenizer)
        return replace(episode, id=f"{episode.id}-unsafe", prefix=cut.prefix)

    def _of_episode(self, episode: Episode, written: Sequence[tuple[int, ...]]) -> list[LabelledPair]:
        cut = [tokens[: len(episode.suffix)] for tokens in written]
        texts = [tokens[: self.tokenizer.whole_characters(tokens, episode.prefix)] for tokens in cut]
        pairs = list(ranked_pairs(episode, texts, self.tokenizer, self.world))
        random.Random(derive_seed(self.seed, "sampled", episode.id)).shuffle(pairs)
        return pairs[:_PAIRS]


def ranked_pairs(
    episode: Episode, texts: Sequence[tuple[int, ...]], tokenizer: PolicyTokenizer, world: World | None
) -> Iterator[LabelledPair]:
    """Yield every two of the document's own continuation and ``texts`` of which one is known to be better.

    Args:
        episode: prefix and own continuation.
        texts: other continuations; equal and blank ones are left out.
        tokenizer: of the policy.
        world: measures both: safe is better than unsafe, then a difference of quality counts. None: the own
            continuation is better than any other one.
    """
    others = [one for one in dict.fromkeys(texts) if one != episode.suffix and one and not tokenizer.is_blank(one)]
    if world is None:
        yield from (LabelledPair(episode, tokens, SAMPLED) for tokens in others)
        return
    before = prefix_text(tokenizer, episode)
    measured = [
        (tokens, measure_text(world, before, tokenizer.text_of(tokens, episode.prefix)))
        for tokens in (episode.suffix, *others)
    ]
    for pair in combinations(measured, 2):
        for (good, better), (bad, worse) in (pair, pair[::-1]):
            if _is_better(better, worse):
                yield LabelledPair(episode, bad, SAMPLED, () if good == episode.suffix else good)


def _is_better(one: Measures, other: Measures) -> bool:
    if one.safe != other.safe:
        return one.safe
    return one.quality - other.quality >= _LEAST
