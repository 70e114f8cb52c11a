"""What examples are made of: pairs of a good and a spoiled suffix, and single texts with a verdict."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rlpt.config import Config
from megatron_rlpt.config.evaluation_sets import QUALITY, SAFETY
from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair, PairPlan, pairs_of_episodes, pairs_of_world
from megatron_rlpt.evaluation.labelled_texts import POINTWISE, LabelledText, balanced, texts_of_pairs
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher_training.corpus import TeacherText, cut_episodes
from megatron_rlpt.teacher_training.request import ASKED, SAMPLED, DataRequest
from megatron_rlpt.teacher_training.sampled import PolicySamples
from megatron_rlpt.teacher_training.teacher_answers import TeacherAnswers
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Episode, derive_seed
from megatron_rlpt.world.facts import World

_log = get_logger(__name__)


@dataclass(frozen=True)
class Material:
    """Makes pairs and texts of documents, as a request asks."""

    config: Config
    """Of the policy's run."""
    asked: DataRequest
    tokenizer: PolicyTokenizer
    teacher: TeacherAnswers

    def pairs(self, part: str, documents: Sequence[TeacherText], plan: PairPlan) -> list[LabelledPair]:
        """Return pairs of all kinds of ``plan``, equally many of each as far as texts can be spoiled so.

        Raises:
            DataError: the documents are too few or too short.
            ConfigError, TeacherError: a teacher is to spoil suffixes, and cannot be asked.
        """
        if not self.asked.needs_pairs():
            return []
        by_rule = tuple(kind for kind in plan.kinds if kind not in (ASKED, SAMPLED))
        by_teacher, by_policy = (plan.pairs * plan.kinds.count(kind) // len(plan.kinds) for kind in (ASKED, SAMPLED))
        rest = plan.pairs - by_teacher - by_policy
        found = self._by_rule(documents, replace(plan, pairs=rest, kinds=by_rule)) if by_rule else []
        if by_teacher:
            found += self.teacher.spoiled(self._episodes(documents, plan, by_teacher, plan.sized(self.config)), part)
        if by_policy:
            found += self._by_policy(self._episodes(documents, plan, by_policy, plan.sized(self.config)), by_policy)
        if by_teacher or by_policy:
            random.Random(derive_seed(plan.seed, "order")).shuffle(found)  # so that a part of them has all kinds
        if len(found) < plan.pairs:
            _log.warning(
                "fewer pairs than asked for: not every text can be spoiled in every way",
                part=part,
                pairs=len(found),
                asked=plan.pairs,
            )
        return found

    def texts(
        self, part: str, documents: Sequence[TeacherText], pairs: Sequence[LabelledPair], plan: PairPlan
    ) -> list[LabelledText]:
        """Return the texts of every axis that judges one text, as many of every verdict.

        Beside quality they are at most half as many as the pairs, so that comparing is what most prompts teach.

        Those of a rewriter are the ones that a teacher voted on.

        Raises:
            ConfigError, TeacherError: a teacher is to vote, and cannot be asked.
        """
        asked = self.asked
        if asked.safety_votes:
            length = asked.lengths or (self.config.data.suffix_length,)
            episodes = self._episodes(documents, plan, plan.pairs, length)
            return balanced(self.teacher.voted_safe(episodes, asked.safety_votes, part), asked.seed)
        axes = [axis for axis in POINTWISE if axis in asked.judged()]
        if not axes:
            return []
        assert asked.world is not None
        world = World.load(asked.world)
        most = len(pairs) // 2 if QUALITY in asked.judged() else 0
        return [text for axis in axes for text in texts_of_pairs(world, pairs, self.tokenizer, axis, asked.seed, most)]

    def _by_rule(self, documents: Sequence[TeacherText], plan: PairPlan) -> list[LabelledPair]:
        asked = self.asked
        if asked.world is not None:
            return pairs_of_world(asked.world, self.config, self.tokenizer, plan, [one.text for one in documents])
        episodes = self._cut(documents)
        if len({episode.document for episode in episodes}) < 2:
            raise DataError(
                f"{', '.join(asked.corpus)}: {len(documents)} documents give {len(episodes)} suffixes; give longer "
                "documents, or lower data.min_prefix or data.suffix_length"
            )
        return pairs_of_episodes(episodes, ", ".join(asked.corpus), self.config, self.tokenizer, plan)

    def _by_policy(self, episodes: Sequence[Episode], count: int) -> list[LabelledPair]:
        asked = self.asked
        world = World.load(asked.world) if asked.world is not None else None
        insults = SAFETY in asked.judged()
        return PolicySamples(self.config, self.tokenizer, asked.seed, world, insults).pairs(episodes, count)

    def _cut(self, documents: Sequence[TeacherText]) -> list[Episode]:
        return cut_episodes(documents, self.config, self.tokenizer, self.asked.per_document)

    def _episodes(
        self, documents: Sequence[TeacherText], plan: PairPlan, count: int, lengths: Sequence[int]
    ) -> list[Episode]:
        """Return at most ``count`` episodes in a random order, whose suffixes have each of ``lengths`` in turn.

        Fewer of them are the first of more, so that what was asked about them is known.
        """
        episodes = self._cut(documents)
        random.Random(derive_seed(plan.seed, "asked")).shuffle(episodes)
        cut = []
        for number, episode in enumerate(episodes[:count]):
            length = lengths[number % len(lengths)]
            whole = self.tokenizer.whole_characters(episode.suffix[:length], episode.prefix)
            cut.append(replace(episode, suffix=episode.suffix[:whole]))
        return [one for one in cut if not self.tokenizer.is_blank(one.suffix)]
