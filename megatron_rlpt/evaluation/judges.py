"""The judges of an evaluation: the configuration's own, the second measure, and those of ``evaluation.judges``.

Each knows what it decides, whether it rewarded the training of a model that it judges here (``in_sample.py``), and
stores its verdicts by content (``verdict_cache.py``). A judge with a model asks teacher servers where some are
configured or announced, and otherwise loads it into this process, only when the first verdict is not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from megatron_rlpt import __version__
from megatron_rlpt.config import (
    AnswerForm,
    AxisConfig,
    Config,
    EndpointConfig,
    TeacherUse,
    flatten,
    judge_facts,
)
from megatron_rlpt.config.evaluation_judges import JUDGE, as_teacher, measures_of
from megatron_rlpt.config.judges import load_judge
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ModelError
from megatron_rlpt.evaluation.in_sample import Recorded, trained_by
from megatron_rlpt.evaluation.results import JudgeRecord
from megatron_rlpt.evaluation.verdict_cache import VerdictCache
from megatron_rlpt.extensions import is_extension
from megatron_rlpt.models.digest import folder_digest
from megatron_rlpt.observe import get_logger
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.build import start_generator
from megatron_rlpt.teacher.generator import TextGenerator
from megatron_rlpt.teacher.judge import GroupJudge, Judge, check_failure_rate, failures, first_cause, most_frequent
from megatron_rlpt.teacher.judges import builder_of
from megatron_rlpt.teacher.prompts import version_of
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.trainer.candidates import marked_if_blank, whole_characters
from megatron_rlpt.types import Candidate, Episode, Group, Source

_log = get_logger(__name__)

_BLOCK = 64
"""Groups that an engine in this process judges between two writes of the cache."""

Done = Callable[[int, Group], None]
"""Takes the position of a group and the judged group."""
MakePrompted = Callable[[str, int], GroupJudge]
"""Builds a judge that asks, from the name of the model and a seed."""


def comparison_group(episode: Episode, continuations: Sequence[Sequence[int]], text: TextTokens) -> Group:
    """Return the group of ``continuations`` of an episode's prefix, cut to whole characters, blank ones marked."""
    written = (Candidate(Source.ROLLOUT, tuple(tokens)) for tokens in continuations)
    whole = (whole_characters(candidate, episode, text) for candidate in written)
    return Group(episode, tuple(marked_if_blank(candidate, text) for candidate in whole))


class Verdicts(Protocol):
    """What a judge is made of: the model or measure behind it."""

    seeded: bool
    """Whether another seed gives other verdicts."""
    prompted: bool
    """Whether any question may be put to it."""

    def identity(self, measure: str) -> Mapping[str, Any]:
        """Return what its verdicts depend on besides group and seed."""
        ...

    def run(self, groups: Sequence[Group], seed: int, measure: str, done: Done) -> None:
        """Judge every group and hand it to ``done``."""
        ...


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

    def _through_cache(
        self,
        groups: Sequence[Group],
        seed: int,
        identity: Mapping[str, Any],
        run: Callable[[Sequence[Group], Done], None],
    ) -> list[Group]:
        cache = self._cache(identity)
        found = [cache.find(group, seed) if cache else None for group in groups]
        missing = [index for index, group in enumerate(found) if group is None]
        if cache and len(missing) < len(groups):
            _log.info("stored verdicts", judge=self.facts.name, found=len(groups) - len(missing), asked=len(missing))

        def keep(position: int, group: Group) -> None:
            found[missing[position]] = group
            if cache:
                cache.store(group, seed)

        if missing:
            run([groups[index] for index in missing], keep)
        judged = [group for group in found if group is not None]
        assert len(judged) == len(groups)
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


class ConfiguredVerdicts(Verdicts):
    """A judge as ``teacher`` configures it, of the package or of the user's."""

    def __init__(self, config: Config) -> None:
        """
        Args:
            config: with the judge as ``teacher.judge`` and precisions resolved.
        """
        self._config = config
        self._facts = facts = judge_facts(config)
        self.prompted = facts.has_axes
        if facts.has_axes:
            self.seeded = config.teacher.generative.answer is not AnswerForm.direct
        else:
            self.seeded = is_extension(config.teacher.judge) and _takes_seed(config.teacher.judge)
        self._servers: list[EndpointConfig] | None = None
        self._generator: TextGenerator | None = None
        self._built: dict[tuple[int, str], Judge] = {}

    @property
    def teacher(self) -> str:
        """What identifies its model: the content of its folder, or how servers call it; empty without a model."""
        if self._facts.asks is TeacherUse.nothing:
            return ""
        if endpoints := self._config.teacher.workers.endpoints:
            return "served " + " ".join(sorted({one.model or one.url.rstrip("/") for one in endpoints}))
        try:
            return folder_digest(self._config.teacher_path)
        except ModelError:
            return self._config.teacher_path

    @override
    def identity(self, measure: str) -> Mapping[str, Any]:
        config = self._variant(0, measure)
        teacher = config.teacher
        identity: dict[str, Any] = {
            "release": __version__,
            "judge": teacher.judge,
            "teacher": self.teacher,
            "tokenizer": folder_digest(config.model.path, ("tokenizer.json", "tokenizer_config.json", "tekken.json")),
        }
        if self._facts.has_axes:
            asked = teacher.generative.asked()
            axes = ("quality", "safety", "factuality")
            versions = [version_of(axis, asked.answer) for axis in axes if getattr(asked, axis).weight > 0]
            return identity | {"settings": asdict(asked), "prompts": versions}
        if is_extension(teacher.judge):
            extension = load_judge(teacher.judge)
            files = {name: _state(value) for name, value in teacher.options.items() if isinstance(value, str)}
            identity |= {"judge": extension.name.rpartition(":")[2], "sha256": extension.sha256}
            return identity | {"options": teacher.options, "files": files, "version": extension.version}
        return identity | {"settings": asdict(teacher.likelihood), "dtype": teacher.dtype.value}

    @override
    def run(self, groups: Sequence[Group], seed: int, measure: str, done: Done) -> None:
        config = self._variant(seed, measure)
        if servers := self._find_servers():
            from megatron_rlpt.judge_workers.asking import judge_on_servers

            judge_on_servers(config, groups, servers, done=done)
            return
        key = (seed if self.seeded else 0, measure)
        if key not in self._built:
            self._built[key] = builder_of(config).in_trainer(config, _device(self._facts.asks), self._start)
        _in_blocks(self._built[key], groups, done)

    def ask(self, make: MakePrompted, groups: Sequence[Group], seed: int, done: Done) -> None:
        """Let the judge that ``make`` builds ask the model."""
        if servers := self._find_servers():
            from megatron_rlpt.judge_workers.asking import judge_on_servers

            judge_on_servers(self._config, groups, servers, lambda pool: make(pool.name, seed), done)
            return
        generator = self._start()
        _in_blocks(BatchedJudge(make(generator.name, seed), generator), groups, done)

    def _variant(self, seed: int, measure: str) -> Config:
        """Return the configuration with this seed, and with no other axis than ``measure``."""
        config = replace(self._config, run=replace(self._config.run, seed=seed))
        if not measure or not self._facts.has_axes:
            return config
        axes = config.teacher.generative
        alone = replace(
            axes,
            quality=replace(axes.quality, weight=float(measure == "quality")),
            safety=_alone(axes.safety, measure == "safety"),
            factuality=_alone(axes.factuality, measure == "factuality"),
        )
        return replace(config, teacher=replace(config.teacher, generative=alone))

    def _find_servers(self) -> list[EndpointConfig]:
        if self._servers is None:
            if self._facts.asks is TeacherUse.nothing:
                self._servers = []
            else:
                from megatron_rlpt.judge_workers.asking import teacher_servers

                self._servers, why = teacher_servers(self._config)
                if why:
                    _log.warning("no teacher server; loading the teacher into this process", reason=why)
        return self._servers

    def _start(self) -> TextGenerator:
        if self._generator is None:
            self._generator = start_generator(self._config, Ranks())
        return self._generator


def open_judges(
    config: Config, models: Mapping[str, Recorded | None], *, cache: Path | None = None, rank: int = 0
) -> list[NamedJudge]:
    """Return the judge of ``teacher`` (``judge``) and those of ``evaluation.judges``; nothing is loaded yet.

    Args:
        config: of the evaluation.
        models: names of the models to judge -> ``in_sample.recorded_training`` of each.
        cache: folder for verdicts; None stores nothing.
        rank: of this process among those that share the folder.
    """
    config = resolve_dtypes(config)
    configured = [(JUDGE, config, measures_of(config))]
    for one in config.evaluation.judges:
        own = as_teacher(config, one)
        configured.append((one.name, own, measures_of(own, tuple(one.measures))))
    judges = []
    for name, own, measures in configured:
        trained = trained_by(flatten(own), models)
        facts = JudgeRecord(name, builder_of(own).describe(own), bool(trained), trained)
        rate = config.teacher.max_failure_rate
        judges.append(NamedJudge(facts, measures, ConfiguredVerdicts(own), rate, cache, rank))
    return judges


def _in_blocks(judge: Judge, groups: Sequence[Group], done: Done) -> None:
    for start in range(0, len(groups), _BLOCK):
        for index, group in enumerate(judge.judge(groups[start : start + _BLOCK]), start):
            done(index, group)


def _alone(axis: AxisConfig, chosen: bool) -> AxisConfig:
    return replace(axis, weight=float(chosen))


def _device(asks: TeacherUse) -> str:
    if asks is TeacherUse.nothing:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _takes_seed(name: str) -> bool:
    import inspect

    return "seed" in inspect.signature(load_judge(name).cls).parameters


def _state(value: str) -> list[Any]:
    """Return size and time of change of the files that an option names, which its judge reads."""
    path = Path(value)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    except OSError:
        return []
