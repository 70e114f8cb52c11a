"""Where the verdicts of an evaluation come from: a judge as ``teacher`` configures it, or the second measure."""

from __future__ import annotations

import gc
import inspect
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
    Role,
    TeacherUse,
    judge_facts,
    model_of,
)
from megatron_rlpt.config.judges import is_reward, load_judge
from megatron_rlpt.config.user_classes import load_second_measure
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ModelError, TeacherError
from megatron_rlpt.evaluation.in_sample import Recorded
from megatron_rlpt.evaluation.second_measure import SecondMeasure, build_second_measure
from megatron_rlpt.extensions import class_name, is_extension
from megatron_rlpt.models.adapters import read_adapter
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.digest import folder_digest
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.build import start_generator
from megatron_rlpt.teacher.generator import TextGenerator
from megatron_rlpt.teacher.judge import GroupJudge, Judge
from megatron_rlpt.teacher.judges import builder_of
from megatron_rlpt.teacher.pairwise import PairwiseJudge
from megatron_rlpt.teacher.prompts import version_of
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Group

_log = get_logger(__name__)

BLOCK = 32
"""Groups that an engine in this process judges between two writes of the cache."""

Done = Callable[[int, Group], None]
"""Takes the position of a group and the judged group."""
MakePrompted = Callable[[str, int], GroupJudge]
"""Builds a judge that asks, from the name of the model and a seed."""


class Verdicts(Protocol):
    """What a judge is made of: the model or measure behind it."""

    seeded: bool
    """Whether another seed gives other verdicts."""
    prompted: bool
    """Whether any question may be put to it."""
    relative: bool
    """Whether a reward depends on the other candidates of its group."""

    def identity(self, measure: str) -> Mapping[str, Any]:
        """Return what its verdicts depend on besides group and seed."""
        ...

    def run(self, groups: Sequence[Group], seed: int, measure: str, done: Done) -> None:
        """Judge every group and hand it to ``done``."""
        ...

    def close(self) -> None:
        """Give up models and their memory; another call loads them again."""
        ...


class ConfiguredVerdicts(Verdicts):
    """A judge as ``teacher`` configures it, of the package or of the user's."""

    def __init__(self, config: Config, ranks: Ranks, *, may_load: bool = True) -> None:
        """
        Args:
            config: with the judge as ``teacher.judge`` and precisions resolved.
            ranks: all ranks; beside others, an engine has a process of its own.
            may_load: load its model where no server has it; otherwise that is an error.
        """
        self._ranks = ranks
        self._config = config
        self._may_load = may_load
        self._facts = facts = judge_facts(config)
        self.prompted = facts.has_axes
        self.relative = facts.has_axes or (
            is_extension(config.teacher.judge) and not is_reward(load_judge(config.teacher.judge))
        )
        if facts.has_axes:
            self.seeded = config.teacher.generative.answer is not AnswerForm.direct
        else:
            self.seeded = is_extension(config.teacher.judge) and _takes_seed(config.teacher.judge)
        self._servers: list[EndpointConfig] | None = None
        self._generator: TextGenerator | None = None
        self._text: PolicyTokenizer | None = None
        self._built: dict[tuple[int, str], Judge] = {}

    @property
    def teacher(self) -> str:
        """What identifies its model: the content of its folder, or how servers call it; empty without a model."""
        if self._facts.asks is TeacherUse.nothing:
            return ""
        if endpoints := self._config.teacher.workers.endpoints:
            return "served " + " ".join(sorted({one.model or one.url.rstrip("/") for one in endpoints}))
        try:
            digest = folder_digest(self._config.teacher_path)
            adapter = read_adapter(self._config.teacher_path)
            return f"{digest} on {folder_digest(adapter.base)}" if adapter else digest
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
            "tokenizer": _tokenizer_digest(config),
        }
        if self._facts.has_axes:
            asked = teacher.generative.asked()
            axes = ("quality", "safety", "factuality")
            used = [axis for axis in axes if getattr(asked, axis).weight > 0]
            versions = [version_of(axis, asked.answer, asked.prompt) for axis in used]
            return identity | {"settings": asdict(asked), "prompts": versions}
        if is_extension(teacher.judge):
            extension = load_judge(teacher.judge)
            files = {name: _state(value) for name, value in teacher.options.items()}
            identity |= {"judge": class_name(extension.name), "sha256": extension.sha256}
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

    @override
    def close(self) -> None:
        self._built.clear()
        self._generator = None
        gc.collect()  # an engine is cyclic garbage

    def comparing(self, question: str) -> tuple[MakePrompted, dict[str, Any]]:
        """Return what ``ask`` takes to compare pairs: the judge, and what its verdicts depend on."""
        config = self._config
        asked = config.teacher.generative.asked()
        if self._text is None:
            self._text = PolicyTokenizer(config.model.path)
        text = self._text
        sampling = {"temperature": asked.temperature, "top_p": asked.top_p, "max_tokens": asked.max_tokens}
        return lambda name, seed: PairwiseJudge(question, name, text, asked, seed), {
            "pairs": version_of(question, asked.answer, asked.prompt),
            "tokenizer": _tokenizer_digest(config),
            **sampling,
        }

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

                found, why = teacher_servers(self._config)
                if not found and not self._may_load:
                    raise TeacherError(f"no teacher server is known ({why or 'none is configured'})")
                self._servers = found
                if why:
                    _log.warning("no teacher server; loading the teacher into this process", reason=why)
        return self._servers

    def _start(self) -> TextGenerator:
        if self._generator is None:
            self._generator = start_generator(self._config, model_of(self._config, Role.judge), self._ranks)
        return self._generator


class SecondVerdicts(Verdicts):
    """The measure of ``evaluation.second_measure``, built and fitted when it first scores."""

    seeded = False
    prompted = False
    relative = False

    def __init__(self, config: Config, vocab_size: int | None) -> None:
        """
        Args:
            config: of the evaluation.
            vocab_size: largest of the models to judge; None is that of ``model.path``.
        """
        self._config = config
        self._vocab_size = vocab_size
        self._measure: SecondMeasure | None = None

    def describe(self) -> str:
        """Describe it as a phrase that fits after "the judge is"."""
        name = self._config.evaluation.second_measure
        return f"the reward {name}" if is_extension(name) else "a Kneser-Ney n-gram model of other text"

    def recorded(self) -> Recorded:
        """Return it as if it were a run's judge, to see whether it was one."""
        settings = self._config.evaluation
        found: dict[str, Any] = {"teacher.judge": settings.second_measure}
        if is_extension(settings.second_measure):
            found["teacher.judge.sha256"] = load_second_measure(settings.second_measure).sha256
        return found | {f"teacher.options.{name}": value for name, value in settings.second_options.items()}

    @override
    def identity(self, measure: str) -> Mapping[str, Any]:
        settings = self._config.evaluation
        if not is_extension(settings.second_measure):
            return {}  # counting it anew takes less time than to tell whether its corpus has changed
        extension = load_second_measure(settings.second_measure)
        return {
            "release": __version__,
            "second": class_name(extension.name),
            "sha256": extension.sha256,
            "options": settings.second_options,
            "files": {name: _state(value) for name, value in settings.second_options.items()},
            "corpus": [[one.path, one.field, *_state(one.path)] for one in settings.second_corpus],
            "tokenizer": _tokenizer_digest(self._config),
        }

    @override
    def close(self) -> None:
        self._measure = None

    @override
    def run(self, groups: Sequence[Group], seed: int, measure: str, done: Done) -> None:
        if self._measure is None:
            size = self._vocab_size or read_architecture(Path(self._config.model.path)).vocab
            self._measure = build_second_measure(self._config, PolicyTokenizer(self._config.model.path), size)
        assert self._measure is not None
        _in_blocks(self._measure, groups, done)


def _in_blocks(judge: Judge, groups: Sequence[Group], done: Done) -> None:
    for start in range(0, len(groups), BLOCK):
        for index, group in enumerate(judge.judge(groups[start : start + BLOCK]), start):
            done(index, group)


def _alone(axis: AxisConfig, chosen: bool) -> AxisConfig:
    return replace(axis, weight=float(chosen))


def _device(asks: TeacherUse) -> str:
    if asks is TeacherUse.nothing:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _takes_seed(name: str) -> bool:
    return "seed" in inspect.signature(load_judge(name).cls).parameters


def _tokenizer_digest(config: Config) -> str:
    return folder_digest(config.model.path, ("tokenizer.json", "tokenizer_config.json", "tekken.json"))


def _state(value: Any) -> list[Any]:
    """Return size and time of change of the files that an option names, because its class reads them."""
    if not isinstance(value, str) or not value:
        return []
    path = Path(value)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    except OSError:
        return []
