"""Judges by name: how each is built in the trainer, for a worker that asks servers, and in a worker without servers.

To add a judge to the package, add its facts to ``config/judges.py: JUDGES`` and its builder to ``BUILDERS`` here.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from typing_extensions import override

from megatron_rlpt.config import Config, PairScheme, TeacherUse, judge_facts, needs_judge
from megatron_rlpt.config.rewriters import rewrites_by_asking
from megatron_rlpt.errors import ConfigError, ModelError
from megatron_rlpt.models.adapters import read_adapter, special_tokens_of
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.extension_judges import CheckedGroupJudge, build_extension_judge, in_process
from megatron_rlpt.teacher.generative import GenerativeJudge
from megatron_rlpt.teacher.generator import Ask, Reply, Request, TextGenerator
from megatron_rlpt.teacher.good_rewrite import GoodRewrite
from megatron_rlpt.teacher.judge import GroupJudge, Judge
from megatron_rlpt.teacher.right_verdict import RightVerdict
from megatron_rlpt.teacher.served_likelihood import ServedLikelihoodJudge, require_same_vocabulary
from megatron_rlpt.teacher.true_continuation import TrueContinuation
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Failed, Group

_log = get_logger(__name__)

StartGenerator = Callable[[], TextGenerator]
"""Starts the teacher's engine in this process, or returns the one that runs already."""


class ServedTeacher(Protocol):
    """Servers of the teacher, as judges see them (``judge_workers.client.pool.TeacherPool``)."""

    @property
    def name(self) -> str:
        """Name of the model, for the provenance of rewards."""
        ...

    async def logprobs(self, tokens: Sequence[int], start: int, /) -> list[float] | Failed:
        """Return the log-probabilities, in nats, of the tokens from position ``start`` on."""
        ...


class JudgeBuilder(Protocol):
    """Builds one judge for each of the locations that judge."""

    def in_trainer(self, config: Config, device: str, start: StartGenerator) -> Judge:
        """Build it for a process with the teacher's model in it, or with none where it asks nothing."""
        ...

    def for_servers(self, config: Config, servers: ServedTeacher) -> GroupJudge:
        """Build it for a worker that asks ``servers``."""
        ...

    def check_servers(self, config: Config) -> None:
        """Find out what would fail before servers are waited for."""
        ...

    def describe(self, config: Config) -> str:
        """Describe it as a phrase that fits after "the judge is"."""
        ...


class LikelihoodBuilder(JudgeBuilder):
    """Builds ``teacher.judge=likelihood``."""

    @override
    def in_trainer(self, config: Config, device: str, start: StartGenerator) -> Judge:
        from megatron_rlpt.teacher.likelihood import LikelihoodJudge

        if read_adapter(config.teacher_path):
            raise ModelError(
                f"teacher.path is {config.teacher_path}, a LoRA adapter, and teacher.judge=likelihood loads only whole "
                "models; merge it into its base, or let servers judge (teacher.run_in=workers)"
            )
        require_same_vocabulary(config)
        return LikelihoodJudge(config.teacher_path, config.teacher.likelihood, device, config.teacher.dtype)

    @override
    def for_servers(self, config: Config, servers: ServedTeacher) -> GroupJudge:
        return ServedLikelihoodJudge(servers.logprobs, servers.name, config.teacher.likelihood)

    @override
    def check_servers(self, config: Config) -> None:
        require_same_vocabulary(config)

    @override
    def describe(self, config: Config) -> str:
        likelihood = config.teacher.likelihood
        return (
            f"the mean log-likelihood under a frozen {Path(config.teacher_path).name}, minus "
            f"{likelihood.repetition_weight:g} times the share of repeated {likelihood.repetition_ngram}-grams"
        )


class AskingBuilder(JudgeBuilder):
    """Builds a judge that asks the teacher's model with prompts; subclasses say which, and describe it."""

    @override
    def in_trainer(self, config: Config, device: str, start: StartGenerator) -> Judge:
        generator = start()
        return BatchedJudge(self.asking(config, generator.name), generator)

    @override
    def for_servers(self, config: Config, servers: ServedTeacher) -> GroupJudge:
        return self.asking(config, servers.name)

    @override
    def check_servers(self, config: Config) -> None:
        pass

    @abstractmethod
    def asking(self, config: Config, teacher: str) -> GroupJudge:
        """Build the judge of a model named ``teacher``."""


class GenerativeBuilder(AskingBuilder):
    """Builds ``teacher.judge=generative``."""

    @override
    def describe(self, config: Config) -> str:
        axes = config.teacher.generative
        used = [axis for axis in ("quality", "safety", "factuality") if getattr(axes, axis).weight]
        return f"{Path(config.teacher_path).name}, prompted, on {' + '.join(used)}"

    @override
    def asking(self, config: Config, teacher: str) -> GenerativeJudge:
        if config.teacher.generative.quality.scheme == PairScheme.pivot:
            _log.warning(
                "teacher.generative.quality.scheme=pivot compares all candidates with one, which hurts (paper: win "
                "rate 84.3 -> 72.1 with 8 rollouts); use scheme=tournament to save calls without that loss"
            )
        return GenerativeJudge(teacher, PolicyTokenizer(config.model.path), config.teacher.generative, config.run.seed)


class RightVerdictBuilder(JudgeBuilder):
    """Builds ``teacher.judge=right_verdict``."""

    @override
    def in_trainer(self, config: Config, device: str, start: StartGenerator) -> Judge:
        return RightVerdict(PolicyTokenizer(config.model.path))

    @override
    def for_servers(self, config: Config, servers: ServedTeacher) -> GroupJudge:
        return LocalJudge(self.in_trainer(config, "cpu", _no_generator), config.teacher.judge)

    @override
    def check_servers(self, config: Config) -> None:
        pass

    @override
    def describe(self, config: Config) -> str:
        return "the label of every prompt"


class GoodRewriteBuilder(AskingBuilder):
    """Builds ``teacher.judge=good_rewrite``."""

    @override
    def describe(self, config: Config) -> str:
        return f"a copy of every good suffix, and for the others {Path(config.teacher_path).name}, prompted"

    @override
    def asking(self, config: Config, teacher: str) -> GoodRewrite:
        path = config.model.path
        text, control = PolicyTokenizer(path), special_tokens_of(path)
        return GoodRewrite(teacher, text, config.teacher.generative, config.run.seed, control)


class TrueContinuationBuilder(AskingBuilder):
    """Builds ``teacher.judge=true_continuation``."""

    @override
    def describe(self, config: Config) -> str:
        return f"{Path(config.teacher_path).name}, asked whether a prediction is as true as the real continuation"

    @override
    def asking(self, config: Config, teacher: str) -> TrueContinuation:
        text = PolicyTokenizer(config.model.path)
        return TrueContinuation(teacher, text, config.teacher.generative, config.run.seed)


class ExtensionBuilder(JudgeBuilder):
    """Builds a judge or a reward of the user's."""

    @override
    def in_trainer(self, config: Config, device: str, start: StartGenerator) -> Judge:
        asks = judge_facts(config).asks is not TeacherUse.nothing
        return in_process(build_extension_judge(config), start() if asks else None)

    @override
    def for_servers(self, config: Config, servers: ServedTeacher) -> GroupJudge:
        judge = build_extension_judge(config)
        asks = judge_facts(config).asks is not TeacherUse.nothing
        if isinstance(judge, CheckedGroupJudge) and asks:
            return judge
        return LocalJudge(in_process(judge, None), config.teacher.judge)

    @override
    def check_servers(self, config: Config) -> None:
        pass

    @override
    def describe(self, config: Config) -> str:
        asks = judge_facts(config).asks is not TeacherUse.nothing
        return config.teacher.judge + (f" with {Path(config.teacher_path).name}" if asks else "")


BUILDERS: Mapping[str, JudgeBuilder] = {
    "likelihood": LikelihoodBuilder(),
    "generative": GenerativeBuilder(),
    "right_verdict": RightVerdictBuilder(),
    "good_rewrite": GoodRewriteBuilder(),
    "true_continuation": TrueContinuationBuilder(),
}
"""``teacher.judge`` -> builder; a class of the user's has ``ExtensionBuilder``."""


class LocalJudge(GroupJudge):
    """A ``GroupJudge``, and the ``TeacherClient`` of a worker that needs no server."""

    all_down = False

    def __init__(self, judge: Judge | None, name: str) -> None:
        """
        Args:
            judge: computes in this process; None if only rewrites are needed.
            name: of it, for the provenance of rewards.
        """
        self._judge = judge
        self.name = name
        # One model computes one thing at a time.
        self._busy = asyncio.Lock()

    @override
    async def judge_group(self, group: Group, ask: Ask) -> Group:
        assert self._judge is not None
        # Other groups wait, the event loop does not.
        async with self._busy:
            (judged,) = await asyncio.to_thread(self._judge.judge, [group])
        return judged

    async def __call__(self, request: Request) -> Reply | Failed:
        """Refuse: nothing is asked by prompt here."""
        return Failed("no teacher server available")


def builder_of(config: Config) -> JudgeBuilder:
    """Return the builder of the judge that ``teacher.judge`` names."""
    return BUILDERS.get(config.teacher.judge) or ExtensionBuilder()


def needs_no_server(config: Config) -> bool:
    """Whether a worker judges by itself: with the teacher's model in its own process, or without any model."""
    asks = needs_judge(config) and judge_facts(config).asks is not TeacherUse.nothing
    return not rewrites_by_asking(config) and (config.teacher.workers.own_model or not asks)


def local_judge(config: Config) -> LocalJudge:
    """Build the judge of a worker that asks no server.

    Raises:
        ModelError: the teacher cannot be used, or cannot score the policy's tokens.
    """
    device = "cpu"
    if needs_judge(config) and judge_facts(config).asks is not TeacherUse.nothing:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = builder_of(config).in_trainer(config, device, _no_generator) if needs_judge(config) else None
    return LocalJudge(judge, getattr(judge, "name", config.teacher.judge))


def _no_generator() -> TextGenerator:
    raise ConfigError("teacher.workers.own_model is true; allowed: false, for a judge that asks for text")
