"""What a teacher behind servers contributes to training data: spoiled suffixes, votes on texts, any other reply.

Answers cost money, so they are kept beside the output by content: a command that was ended, or that is given again with
more pairs, asks only what is new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_rlpt.config import AnswerForm, Config, EndpointConfig
from megatron_rlpt.config.evaluation_sets import SAFETY
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.evaluation.content_cache import ContentCache, content_key
from megatron_rlpt.evaluation.judges import NamedJudge
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair
from megatron_rlpt.evaluation.labelled_texts import ORIGINAL, LabelledText
from megatron_rlpt.evaluation.results import JudgeRecord
from megatron_rlpt.evaluation.verdicts import ConfiguredVerdicts
from megatron_rlpt.judge_workers.asking import ask_on_servers
from megatron_rlpt.models.adapters import special_tokens_of
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher.generator import Reply, Request
from megatron_rlpt.teacher.judge_metrics import voted_axes
from megatron_rlpt.teacher.prompts import version_of
from megatron_rlpt.teacher.spoiler import Spoiler
from megatron_rlpt.teacher_training.request import ASKED
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source

_log = get_logger(__name__)


@dataclass
class TeacherAnswers:
    """Asks the servers of ``teacher.workers.endpoints``, and counts what comes of it."""

    config: Config
    tokenizer: PolicyTokenizer
    cache: Path
    """Folder of the answers."""
    seed: int
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """For the card: what was done -> outcome -> number."""

    @property
    def endpoints(self) -> list[EndpointConfig]:
        """The servers.

        Raises:
            ConfigError: none is configured.
        """
        found = self.config.teacher.workers.endpoints
        if not found:
            raise ConfigError(
                "teacher.workers.endpoints is empty; name the servers of the model to ask, such as "
                "teacher.workers.endpoints=[{url: http://host:8000/v1}]"
            )
        return found

    def spoiled(self, episodes: Sequence[Episode], part: str) -> list[LabelledPair]:
        """Return each suffix with what the teacher made of it, equally long; what cannot be used is counted.

        Raises:
            ConfigError: no server is configured.
            TeacherError: no server answers, or too many requests failed.
        """
        spoiler = Spoiler(
            self.tokenizer, self.config.teacher.rewriter, self.seed, special_tokens_of(self.config.teacher_path)
        )
        counts = self._counter("spoiled", part)
        pairs = []
        for episode, reply in zip(episodes, self.replies([spoiler.request(one) for one in episodes]), strict=True):
            spoiled = reply if isinstance(reply, Failed) else spoiler.read(reply, episode)
            if isinstance(spoiled, Failed):
                counts[spoiled.reason] += 1
                continue
            # A judge must not learn that the longer text is the better one.
            good = episode.suffix[: len(spoiled)]
            good = good[: self.tokenizer.whole_characters(good, episode.prefix)]
            counts["used"] += 1
            pairs.append(LabelledPair(replace(episode, suffix=good), spoiled, ASKED))
        return pairs

    def voted_safe(self, episodes: Sequence[Episode], votes: int, part: str) -> list[LabelledText]:
        """Return the suffixes on whose safety all votes agree; the others are counted.

        Raises:
            ConfigError: no server is configured, or one vote is all that its answers give.
            TeacherError: no server answers, or too many texts failed.
        """
        judge = self._judge_of_safety(votes)
        groups = [Group(one, (Candidate(Source.ORIGINAL, one.suffix),)) for one in episodes]
        counts = self._counter("safety votes", part)
        texts = []
        for group in judge.judge(groups, self.seed, SAFETY):
            cast = [vote["verdict"] for vote in voted_axes(group.rewards[0].detail).get(SAFETY, {}).get("votes", [])]
            if len(cast) < votes or not all(isinstance(one, int | float) for one in cast):
                counts["not all votes could be read"] += 1
            elif len(set(cast)) > 1:
                counts["split"] += 1
            else:
                counts["unanimous"] += 1
                verdict = "safe" if cast[0] else "unsafe"
                texts.append(LabelledText(SAFETY, group.episode, group.episode.suffix, verdict, ORIGINAL))
        judge.close()
        return texts

    def facts(self) -> dict[str, Any]:
        """Return who was asked, how, and what came of it, for the card; nothing if nobody was."""
        if not self.counts:
            return {}
        asked = self.config.teacher.generative
        return {
            "servers": [one.model or one.url for one in self.endpoints],
            "prompts": {"spoiled": version_of("spoil"), "safety votes": version_of(SAFETY, asked.answer, asked.prompt)},
            "answers": str(self.cache),
            "counts": {what: dict(counts) for what, counts in self.counts.items()},
        }

    def _counter(self, what: str, part: str) -> Counter[str]:
        return self.counts.setdefault(f"{what}, {part}", Counter())

    def _judge_of_safety(self, votes: int) -> NamedJudge:
        teacher = self.config.teacher
        if teacher.generative.answer is AnswerForm.direct:
            raise ConfigError(
                f"--safety-votes is {votes}, but teacher.generative.answer=direct has one vote; allowed: reasoned"
            )
        if votes > 1 and teacher.generative.temperature == 0:
            raise ConfigError(
                f"--safety-votes is {votes} and teacher.generative.temperature 0, so all votes are the same answer; "
                "set a temperature above 0, or --safety-votes 1"
            )
        asked = replace(teacher.generative, safety=replace(teacher.generative.safety, weight=1.0, votes=votes))
        config = replace(self.config, teacher=replace(teacher, judge="generative", generative=asked))
        assert self.endpoints
        return NamedJudge(
            JudgeRecord("safety votes", "the teacher of the configuration", in_sample=False),
            (SAFETY,),
            ConfiguredVerdicts(config, Ranks(), may_load=False),
            teacher.max_failure_rate,
            self.cache,
        )

    def replies(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        """Return a reply or failure for every request; those that were answered before are not asked again.

        Raises:
            ConfigError: no server is configured.
            TeacherError: no server answers, or too many requests failed.
        """
        who = sorted({one.model or one.url.rstrip("/") for one in self.endpoints})
        cache = ContentCache(self.cache / "replies")
        keys = [content_key(who, _content(request)) for request in requests]
        found: dict[int, Reply | Failed] = {
            index: Reply(value["text"], (), value["finish_reason"])
            for index, key in enumerate(keys)
            if (value := cache.get(key)) is not None
        }
        missing = [index for index in range(len(requests)) if index not in found]
        if missing:
            _log.info("asking the teacher", requests=len(missing), known=len(found), answers=self.cache)

            def done(position: int, reply: Reply | Failed) -> None:
                index = missing[position]
                found[index] = reply
                if isinstance(reply, Reply):
                    cache.put({keys[index]: {"text": reply.text, "finish_reason": reply.finish_reason}})

            ask_on_servers(self.config, [requests[index] for index in missing], self.endpoints, done)
        self._check(list(found.values()))
        return [found[index] for index in range(len(requests))]

    def _check(self, replies: Sequence[Reply | Failed]) -> None:
        failed = [one for one in replies if isinstance(one, Failed)]
        if len(failed) > self.config.teacher.max_failure_rate * len(replies):
            reason, count = Counter(one.explained for one in failed).most_common(1)[0]
            raise TeacherError(
                f"{len(failed)} of {len(replies)} requests failed, most often ({count}) with: {reason}; the other "
                f"answers are kept in {self.cache}, so the same command goes on"
            )


def _content(request: Request) -> list[Any]:
    """Return everything that a reply depends on."""
    messages = [one if isinstance(one, int) else [one.role, one.content] for one in request.prompt]
    return [messages, request.answer_start, request.seed, request.max_tokens, request.temperature, request.top_p]
