"""The judges of an evaluation: the configuration's own, the second measure, and those of ``evaluation.judges``.

Each knows what it decides, whether it took part in the training of a model that it judges (``in_sample.py``), and
stores its verdicts by content (``verdict_cache.py``). A judge with a model asks teacher servers where some are
configured or announced, and otherwise loads it into this process, only when the first verdict is not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_rlpt.config import Config, flatten
from megatron_rlpt.config.evaluation_judges import JUDGE, JUDGED, SECOND, as_teacher, measures_of
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.evaluation.in_sample import Recorded, trained_by
from megatron_rlpt.evaluation.results import JudgeRecord
from megatron_rlpt.evaluation.verdict_cache import VerdictCache
from megatron_rlpt.evaluation.verdicts import ConfiguredVerdicts, Done, MakePrompted, SecondVerdicts, Verdicts
from megatron_rlpt.extensions import is_extension
from megatron_rlpt.observe import get_logger
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.rollout.readable import marked_if_blank, whole_characters
from megatron_rlpt.teacher.judge import check_failure_rate, failures, first_cause, most_frequent
from megatron_rlpt.teacher.judges import builder_of
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

_log = get_logger(__name__)


def comparison_group(episode: Episode, continuations: Sequence[Sequence[int]], text: TextTokens) -> Group:
    """Return the group of ``continuations`` of an episode's prefix, cut to whole characters, blank ones marked."""
    written = (Candidate(Source.ROLLOUT, tuple(tokens)) for tokens in continuations)
    whole = (whole_characters(candidate, episode, text) for candidate in written)
    return Group(episode, tuple(marked_if_blank(candidate, text) for candidate in whole))


class NamedJudge:
    """A judge of an evaluation."""

    def __init__(
        self, facts: JudgeRecord, measures: tuple[str, ...], verdicts: Verdicts, max_failure_rate: float = 1.0,
        cache: Path | None = None, rank: int = 0,
    ) -> None:  # fmt: skip
        """
        Args:
            facts: for reports.
            measures: what it decides: any of quality, coherence, safety, factuality.
            verdicts: the judge itself.
            max_failure_rate: share of failed judgments in one call above which it raises.
            cache: folder of stored verdicts; None stores nothing.
            rank: of this process among those that share the folder.
        """
        self.facts = facts
        self.measures = measures
        self._verdicts = verdicts
        self._max_failure_rate = max_failure_rate
        self._folder, self._rank = cache, rank
        self._caches: dict[str, VerdictCache] = {}

    @property
    def seeded(self) -> bool:
        """Whether another seed gives other verdicts; if not, one seed says all."""
        return self._verdicts.seeded

    @property
    def prompted(self) -> bool:
        """Whether ``ask`` is possible."""
        return self._verdicts.prompted

    @property
    def is_relative(self) -> bool:
        """Whether a reward depends on the other candidates of its group, so that only those are to be compared."""
        return self._verdicts.relative

    def score(self, groups: Sequence[Group], seed: int = 0) -> list[Group]:
        """Judge as ``judge`` does, but store every candidate by itself, for a judge that is not relative.

        Those of a group that are not stored are judged together, so that their prefix is read once.

        Raises:
            TeacherError, ModelError: as for ``judge``.
        """
        seed = seed if self.seeded else 0
        cache = self._cache(self._verdicts.identity(""))
        known: dict[tuple[int, Candidate], Reward | Failed] = {}
        missing: list[Group] = []
        places: list[int] = []
        for index, group in enumerate(groups):
            for one in dict.fromkeys(group.candidates):
                found = cache.find(replace(group, candidates=(one,)), seed) if cache is not None else None
                if found is not None:
                    known[index, one] = found.rewards[0]
            if lacking := tuple(one for one in dict.fromkeys(group.candidates) if (index, one) not in known):
                missing.append(replace(group, candidates=lacking))
                places.append(index)

        def keep(position: int, group: Group) -> None:
            for one, reward in zip(group.candidates, group.rewards, strict=True):
                known[places[position], one] = reward
                if cache is not None:
                    cache.store(replace(group, candidates=(one,), rewards=(reward,)), seed)

        if missing:
            self._verdicts.run(missing, seed, "", keep)
        return self._checked(
            [
                replace(group, rewards=tuple(known[index, one] for one in group.candidates))
                for index, group in enumerate(groups)
            ]
        )

    def compare(self, groups: Sequence[Group], seed: int, question: str) -> list[Group]:
        """Let a prompted judge compare the two candidates of every group, in both orders (``teacher/pairwise.py``).

        Raises:
            TypeError, TeacherError, ModelError: as for ``ask``.
        """
        if not isinstance(self._verdicts, ConfiguredVerdicts) or not self.prompted:
            raise TypeError(f"judge {self.facts.name} answers no prompts")
        make, identity = self._verdicts.comparing(question)
        return self.ask(make, identity, groups, seed if self.seeded else 0)

    def judge(self, groups: Sequence[Group], seed: int = 0, measure: str = "") -> list[Group]:
        """Return the groups in order, with one ``Reward`` or ``Failed`` per candidate.

        Args:
            groups: what to judge; see ``comparison_group``.
            seed: of votes and orders.
            measure: quality, safety or factuality alone, of a prompted judge; empty is its reward as configured.

        Raises:
            TeacherError: the judge failed on more than ``teacher.max_failure_rate``, or no server answers.
            ModelError: its model cannot be used.
        """

        def run(missing: Sequence[Group], keep: Done) -> None:
            self._verdicts.run(missing, seed, measure, keep)

        return self._through_cache(groups, seed if self.seeded else 0, self._verdicts.identity(measure), run)

    def ask(
        self, make: MakePrompted, identity: Mapping[str, Any], groups: Sequence[Group], seed: int = 0
    ) -> list[Group]:
        """Put another question to the model of a prompted judge.

        Args:
            make: builds the judge that asks.
            identity: what its verdicts depend on besides model, group and seed: the version of its prompt, votes,
                sampling.
            groups: what to judge.
            seed: of votes and orders.

        Raises:
            TypeError: the judge is not prompted.
            TeacherError, ModelError: as for ``judge``.
        """
        if not isinstance(self._verdicts, ConfiguredVerdicts) or not self.prompted:
            raise TypeError(f"judge {self.facts.name} answers no prompts")
        asked = self._verdicts

        def run(missing: Sequence[Group], keep: Done) -> None:
            asked.ask(make, missing, seed, keep)

        return self._through_cache(groups, seed, {"teacher": asked.teacher, "asked": dict(identity)}, run)

    def close(self) -> None:
        """Give up the judge's model and its memory; a later call loads it again."""
        self._verdicts.close()

    def _through_cache(
        self,
        groups: Sequence[Group],
        seed: int,
        identity: Mapping[str, Any],
        run: Callable[[Sequence[Group], Done], None],
    ) -> list[Group]:
        cache = self._cache(identity)
        found = [cache.find(group, seed) if cache is not None else None for group in groups]
        missing = [index for index, group in enumerate(found) if group is None]
        if cache is not None and len(missing) < len(groups):
            _log.info("stored verdicts", judge=self.facts.name, found=len(groups) - len(missing), asked=len(missing))

        def keep(position: int, group: Group) -> None:
            found[missing[position]] = group
            if cache is not None:
                cache.store(group, seed)

        if missing:
            run([groups[index] for index in missing], keep)
        judged = [group for group in found if group is not None]
        assert len(judged) == len(groups)
        return self._checked(judged)

    def _checked(self, judged: list[Group]) -> list[Group]:
        if check_failure_rate(judged, self._max_failure_rate):
            failed = failures(judged)
            _log.warning(
                "the judge failed", judge=self.facts.name, reasons=most_frequent(failed), cause=first_cause(failed)
            )
        return judged

    def _cache(self, identity: Mapping[str, Any]) -> VerdictCache | None:
        if self._folder is None or not identity:
            return None
        key = repr(sorted(identity.items()))
        if key not in self._caches:
            self._caches[key] = VerdictCache(self._folder, identity, self._rank)
        return self._caches[key]


def open_judges(
    config: Config,
    models: Mapping[str, Recorded | None],
    *,
    cache: Path | None = None,
    ranks: Ranks | None = None,
    vocab_size: int | None = None,
    may_load: bool = True,
) -> list[NamedJudge]:
    """Return the judge of ``teacher``, the second measure if there is one, and the judges of ``evaluation.judges``.

    Nothing is loaded before a verdict is missing.

    Args:
        config: of the evaluation.
        models: names of the models to judge -> ``in_sample.recorded_training`` of each.
        cache: folder for verdicts; None stores nothing.
        ranks: all ranks that judge, each its own share; None is this process alone.
        vocab_size: largest of the models to judge; None is that of ``model.path``.
        may_load: load models into this process where no server has them; otherwise a judge without servers raises.
    """
    config = resolve_dtypes(config)
    together = ranks or Ranks()

    def opened(name: str, recorded: Recorded, said: str, measures: tuple[str, ...], verdicts: Verdicts) -> NamedJudge:
        trained = trained_by(recorded, models)
        facts = JudgeRecord(name, said, bool(trained), trained)
        return NamedJudge(facts, measures, verdicts, config.teacher.max_failure_rate, cache, together.rank)

    def configured(name: str, own: Config, measures: tuple[str, ...]) -> NamedJudge:
        verdicts = ConfiguredVerdicts(own, together, may_load=may_load)
        return opened(name, flatten(own), _describe(own), measures, verdicts)

    judges = [configured(JUDGE, config, measures_of(config))]
    if is_extension(config.evaluation.second_measure) or config.evaluation.second_corpus:
        second = SecondVerdicts(config, vocab_size)
        judges.append(opened(SECOND, second.recorded(), second.describe(), JUDGED[:1], second))
    for one in config.evaluation.judges:
        own = as_teacher(config, one)
        judges.append(configured(one.name, own, measures_of(own, tuple(one.measures))))
    return judges


def _describe(config: Config) -> str:
    """Describe the judge of ``config``; one that is served by the model or host that its servers name."""
    teacher = config.teacher
    models = sorted({one.model for one in teacher.workers.endpoints if one.model})
    hosts = sorted({urlsplit(one.url).netloc for one in teacher.workers.endpoints})
    if models or (hosts and not teacher.path):
        config = replace(config, teacher=replace(teacher, path="+".join(models or hosts)))
    return builder_of(config).describe(config)
