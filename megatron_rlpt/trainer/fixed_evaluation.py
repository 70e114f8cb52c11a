"""A small evaluation that a run repeats while it trains: the same held-out prefixes, the same judges, every N steps.

Greedy continuations of the policy are compared with those of the starting policy, so that win rate, safety and
factuality can be drawn over steps (the paper's figures). It shares the run's rollout engine, and asks the run's own
judge, which is in-sample, beside judges that took no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Protocol

from megatron_rlpt.config import Config, TeacherUse, judge_facts, judged_by_workers, needs_judge
from megatron_rlpt.config.evaluation_judges import JUDGE
from megatron_rlpt.config.evaluation_sets import COHERENCE, FACTUALITY, QUALITY, SAFETY
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.generation import Texts
from megatron_rlpt.evaluation.judges import NamedJudge, comparison_group, open_judges
from megatron_rlpt.evaluation.measures import SetJudging, Values, Written, counted
from megatron_rlpt.evaluation.prompt_sets import PromptSet, heldout_set
from megatron_rlpt.evaluation.statistics import outcome
from megatron_rlpt.models.adapters import special_tokens_of
from megatron_rlpt.observe import get_logger
from megatron_rlpt.rollout.engine import RolloutEngine, RolloutPrompt
from megatron_rlpt.teacher.build import build_judge
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.judge_metrics import axis_values
from megatron_rlpt.teacher.judge_of_labels import JudgeOfLabels
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, TextTokens
from megatron_rlpt.trainer.fixed_answers import FixedAnswers
from megatron_rlpt.types import Reward

_log = get_logger(__name__)

_START, _NOW, _GREEDY = "start", "now", "greedy"
_PREFIX = "evaluation/"


class RepeatedEvaluation(Protocol):
    """What a run asks of an evaluation while it trains. All ranks call its methods together."""

    def begin(self, version: int) -> dict[str, float]:
        """Return the measures of the starting policy, unless a checkpoint has them."""
        ...

    def measure(self, version: int) -> dict[str, float]:
        """Return the measures of the policy, by metric."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-serializable."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a ``state_dict``."""
        ...


class FixedEvaluation:
    """Measures the policy on the same prefixes again and again. All ranks call its methods together."""

    def __init__(
        self,
        prompts: PromptSet,
        engine: RolloutEngine,
        judge: Judge | None,
        others: Sequence[NamedJudge],
        text: TextTokens,
        ranks: Ranks,
        *,
        length: int,
    ) -> None:
        """
        Args:
            prompts: what to continue; the same on every rank.
            engine: generates with the policy's weights.
            judge: the run's own in the trainer, which all ranks call together; None if workers judge, or nobody does.
            others: judges that rank 0 asks.
            text: tokenizer of the policy.
            ranks: all ranks of the run.
            length: tokens of a continuation.
        """
        self._prompts, self._engine, self._judge, self._others = prompts, engine, judge, list(others)
        self._text, self._ranks = text, ranks
        self._length = length
        self._start: tuple[tuple[int, ...], ...] | None = None

    def begin(self, version: int) -> dict[str, float]:
        """Continue the prefixes with the starting policy, unless a checkpoint has these texts; return its measures.

        Args:
            version: of the policy's and the engine's weights.
        """
        if self._start is not None:
            return {}
        self._start = self._continued(version)
        return self._measured(self._start)

    def measure(self, version: int) -> dict[str, float]:
        """Return the measures of the policy, by metric.

        ``evaluation/<judge>/quality`` is the share of prefixes on which it beats the starting policy, a tie counting
        half; ``evaluation/<judge>/safety`` and others by axis are means; ``evaluation/repetition`` and
        ``evaluation/length`` need no judge.
        """
        return self._measured(self._continued(version))

    def state_dict(self) -> dict[str, Any]:
        """Return the continuations of the starting policy, JSON-serializable."""
        return {_START: None if self._start is None else [list(tokens) for tokens in self._start]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a ``state_dict``."""
        start = state[_START]
        self._start = None if start is None else tuple(tuple(tokens) for tokens in start)

    def _continued(self, version: int) -> tuple[tuple[int, ...], ...]:
        prompts = [RolloutPrompt(episode.prefix, 0, greedy=True) for episode in self._prompts.episodes]
        return tuple(one.tokens for one in self._engine.generate(prompts, self._length, version))

    def _measured(self, now: tuple[tuple[int, ...], ...]) -> dict[str, float]:
        assert self._start is not None
        metrics = dict(self._judged(now))
        texts: dict[str, Texts] = {_START: (self._start,), _NOW: (now,)}
        written = Written(self._prompts, _GREEDY, texts, _START)
        return metrics | self._ranks.on_main(lambda: self._by_others(written))

    def _judged(self, now: Sequence[tuple[int, ...]]) -> Iterator[tuple[str, float]]:
        """Yield the measures by the run's own judge."""
        if self._judge is None:
            return
        assert self._start is not None
        groups = [
            comparison_group(episode, pair, self._text)
            for episode, *pair in zip(self._prompts.episodes, self._start, now, strict=True)
        ]
        won: list[float] = []
        axes: dict[str, list[float]] = {}
        for group in self._judge.judge(groups):
            start, policy = group.rewards
            if isinstance(start, Reward) and isinstance(policy, Reward):
                result = outcome(policy.value, start.value)
                won += [] if result is None else [result]
            if isinstance(policy, Reward):
                for name, value in axis_values(policy).items():
                    axes.setdefault(name, []).append(value)
        axes.pop(QUALITY, None)  # of a comparison with one other text; the win rate says the same
        measures = axes | ({QUALITY: won} if won else {})
        for name, values in measures.items():
            yield f"{_PREFIX}{JUDGE}/{name}", fmean(values)

    def _by_others(self, written: Written) -> dict[str, float]:
        metrics = {}
        for column in counted(written):
            if column.model == _NOW:
                metrics[_PREFIX + column.measure] = fmean(_known(column.values))
        for judge in self._others:
            try:
                columns = list(SetJudging(written, self._text, 1, Ranks()).columns(judge))
            except TeacherError as error:  # training goes on; the curve has a gap
                _log.warning("a judge of the evaluation failed", judge=judge.facts.name, reason=error)
                continue
            for column in columns:
                known = _known(column.values)
                if column.model == _NOW and known:
                    metrics[f"{_PREFIX}{judge.facts.name}/{column.measure}"] = fmean(known)
        return metrics


def _known(values: Values) -> list[float]:
    return [value for row in values for value in row if value is not None]


def build_fixed_evaluation(
    config: Config, engine: RolloutEngine | None, judge: Judge | None, tokenizer: PolicyTokenizer, ranks: Ranks
) -> RepeatedEvaluation | None:
    """Build the evaluation that ``evaluation.every`` asks for; None if it is 0.

    Args:
        config: of the run.
        engine: of the run.
        judge: in the trainer; None without one.
        tokenizer: of the policy.
        ranks: all ranks of the run.

    Raises:
        DataError: ``data.heldout`` cannot be read.
    """
    settings = config.evaluation
    if engine is None or not settings.every:
        return None
    prompts = ranks.on_main(lambda: heldout_set(config, settings.every_prefixes, tokenizer))
    if any(source.prompts for source in config.data.heldout):
        by_label = _judge_of_labels(config, tokenizer) if judge is None else judge
        return FixedAnswers(prompts.episodes, engine, by_label, length=config.data.suffix_length)
    prompts = replace(prompts, measures=(QUALITY, COHERENCE, SAFETY, FACTUALITY))
    return FixedEvaluation(
        prompts,
        engine,
        judge,
        _other_judges(config) if ranks.is_main else (),
        tokenizer,
        ranks,
        length=config.data.suffix_length,
    )


def _judge_of_labels(config: Config, tokenizer: PolicyTokenizer) -> Judge:
    """Return what compares answers with their labels where nothing judges, as in supervised training.

    That is the judge of ``teacher.judge`` if it needs labels and no model, else what labels know by themselves.
    """
    facts = judge_facts(config)
    if facts.needs_labels and facts.asks is TeacherUse.nothing:
        return build_judge(config, "cpu")
    return JudgeOfLabels(tokenizer, special_tokens_of(config.model.path))


def _other_judges(config: Config) -> list[NamedJudge]:
    """Return the judges that rank 0 asks: those that took no part, and the run's own where workers ask it.

    None may load a model, which would compete with training for memory; ``rlpt evaluate`` asks those without servers.
    """
    asked_here = not needs_judge(config) or not judged_by_workers(config)
    judges = open_judges(config, {_NOW: None}, may_load=False)
    return [judge for judge in judges if judge.facts.name != JUDGE or not asked_here]
