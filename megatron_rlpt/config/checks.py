"""Ranges of single fields and agreement between fields, checked before anything heavy loads."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from megatron_rlpt.config.buffer_address import RedisAddress, check_name, parse_url
from megatron_rlpt.config.endpoints import check_endpoints, is_variable, no_variable
from megatron_rlpt.config.schema import (
    AxisConfig,
    Config,
    JudgeName,
    QualityConfig,
    RunIn,
    SourceConfig,
)
from megatron_rlpt.config.sources import possible_formats, unused_option
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.objectives import ObjectiveFacts, check_objective, facts_of
from megatron_rlpt.types import Source

T = TypeVar("T")
_WRITABLE = re.compile(r"[^\0\ud800-\udfff]*")
_Check = tuple[str, Callable[[Any], bool], str]

_RANGES: list[_Check] = [
    ("parallel.tensor", lambda v: v >= 1, "at least 1"),
    ("parallel.pipeline", lambda v: v >= 1, "at least 1"),
    ("parallel.virtual_stages", lambda v: v >= 1, "at least 1"),
    ("parallel.context", lambda v: v >= 1, "at least 1"),
    ("parallel.expert", lambda v: v >= 1, "at least 1"),
    ("parallel.timeout", lambda v: v > 0, "above 0 seconds"),
    ("data.suffix_length", lambda v: v >= 1, "at least 1"),
    ("data.min_prefix", lambda v: v >= 1, "at least 1"),
    ("data.max_prefix", lambda v: v >= 1, "at least 1"),
    ("data.episodes_per_document", lambda v: v >= 0, "0 (all) or more"),
    ("data.shuffle_buffer", lambda v: v >= 1, "at least 1"),
    ("data.max_bad_fraction", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("data.max_record_bytes", lambda v: v >= 1, "at least 1"),
    ("candidates.rollouts", lambda v: v >= 0, "0 or more"),
    ("candidates.curriculum.start", lambda v: v >= 0, "0 or more"),
    ("candidates.curriculum.grow_above", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("candidates.curriculum.window", lambda v: v >= 1, "at least 1"),
    ("candidates.curriculum.probe", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("rollout.temperature", lambda v: v > 0, "above 0"),
    ("rollout.max_batch", lambda v: v >= 1, "at least 1"),
    ("rollout.kv_cache_gib", lambda v: v > 0, "above 0"),
    ("rollout.sync_bucket_mib", lambda v: v >= 1, "at least 1"),
    ("rollout.warn_logprob_gap", lambda v: v > 0, "above 0"),
    ("rollout.max_logprob_gap", lambda v: v > 0, "above 0"),
    ("teacher.likelihood.repetition_weight", lambda v: v >= 0, "0 or more"),
    ("teacher.likelihood.repetition_ngram", lambda v: v >= 1, "at least 1"),
    ("teacher.likelihood.batch_tokens", lambda v: v >= 1, "at least 1"),
    ("teacher.generative.temperature", lambda v: v >= 0, "0 or more"),
    ("teacher.generative.top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("teacher.generative.max_tokens", lambda v: v >= 1, "at least 1"),
    ("teacher.rewriter.temperature", lambda v: v >= 0, "0 or more"),
    ("teacher.rewriter.top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("teacher.rewriter.anchor_words", lambda v: v >= 0, "0 or more"),
    ("teacher.max_context", lambda v: v >= 1, "at least 1"),
    ("teacher.kv_cache_gib", lambda v: v > 0, "above 0"),
    ("teacher.max_failure_rate", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("teacher.workers.groups", lambda v: v >= 1, "at least 1"),
    ("teacher.workers.lease", lambda v: v > 0, "above 0 seconds"),
    ("teacher.workers.max_attempts", lambda v: v >= 1, "at least 1"),
    ("teacher.workers.request_deadline", lambda v: v > 0, "above 0 seconds"),
    ("teacher.workers.group_deadline", lambda v: v > 0, "above 0 seconds"),
    ("teacher.workers.drain", lambda v: v >= 0, "0 seconds or more"),
    ("teacher.workers.metrics_port", lambda v: -1 <= v <= 65535, "a port, 0 (a free one) or -1 (off)"),
    ("buffer.retry", lambda v: v >= 0, "0 seconds or more"),
    ("buffer.max_pause", lambda v: v >= 0, "0 (for ever) or more seconds"),
    ("objective.beta", lambda v: v > 0, "above 0"),
    ("objective.reference_refresh", lambda v: v >= 0, "0 (frozen) or more"),
    ("objective.clip_low", lambda v: 0 < v < 1, "above 0 and below 1"),
    ("objective.clip_high", lambda v: v > 0, "above 0"),
    ("optimizer.lr", lambda v: v > 0, "above 0"),
    ("optimizer.min_lr", lambda v: v >= 0, "0 or more"),
    ("optimizer.warmup_steps", lambda v: v >= 0, "0 or more"),
    ("optimizer.weight_decay", lambda v: v >= 0, "0 or more"),
    ("optimizer.beta1", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("optimizer.beta2", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("optimizer.eps", lambda v: v > 0, "above 0"),
    ("optimizer.clip_grad", lambda v: v >= 0, "0 (off) or more"),
    ("train.steps", lambda v: v >= 1, "at least 1"),
    ("train.global_batch", lambda v: v >= 1, "at least 1"),
    ("train.micro_batch", lambda v: v >= 1, "at least 1"),
    ("train.staleness", lambda v: v >= 0, "0 or more"),
    ("train.empty_window", lambda v: v >= 1, "at least 1"),
    ("train.max_empty_share", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("train.logprob_chunk", lambda v: v >= 1, "at least 1"),
    ("train.max_stall", lambda v: v >= 0, "0 (never) or more seconds"),
    ("checkpoint.every", lambda v: v >= 1, "at least 1"),
    ("checkpoint.keep", lambda v: v >= 1, "at least 1"),
    ("observe.samples_per_step", lambda v: v >= 0, "0 or more"),
    ("evaluation.prefixes", lambda v: v >= 2, "at least 2 (an interval needs two)"),
    ("evaluation.samples", lambda v: v >= 1, "at least 1"),
    ("evaluation.examples", lambda v: v >= 0, "0 or more"),
]

_NEUTRAL_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


def objective_facts(config: Config) -> ObjectiveFacts:
    """Return the facts of the run's objective."""
    return facts_of(config.objective.name)


def needs_judge(config: Config) -> bool:
    """Whether the objective selects by reward, so that the run has a judge."""
    return objective_facts(config).needs_judge


def rows_per_example(config: Config) -> int:
    """Return the most sequences that an update trains on per episode."""
    offered = config.candidates
    return objective_facts(config).rows_per_example(
        original=offered.original, rewrite=offered.rewrite, rollouts=offered.rollouts
    )


def asks_teacher(config: Config) -> bool:
    """Whether a run asks the teacher for anything: scores, or a rewrite."""
    return needs_judge(config) or config.candidates.rewrite


def judged_by_workers(config: Config) -> bool:
    """Whether groups go out to judge workers, for their scores or for a rewrite."""
    return asks_teacher(config) and config.teacher.run_in is RunIn.workers


def validate(config: Config) -> None:
    """Check ranges and cross-field agreement; cheap, so that it runs before anything heavy loads.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    for key, number in _leaves(config, float):
        if not math.isfinite(number):
            raise ConfigError(f"{key} is {number}; allowed: a finite number")
    for key, text in _leaves(config, str):
        if not _WRITABLE.fullmatch(text):
            raise ConfigError(
                f"{key} is {text!r}; allowed: text that a file can hold, without NUL and broken characters"
            )
    for key, accepts, allowed in _RANGES:
        value = operator.attrgetter(key)(config)
        if not accepts(value):
            raise ConfigError(f"{key} is {value}; allowed: {allowed}")
    for group in ("data.sources", "data.heldout", "evaluation.ngram_corpus"):
        for index, source in enumerate(operator.attrgetter(group)(config)):
            _check_source(source, f"{group}[{index}]")
    for required in ("run.dir", "model.path"):
        if not operator.attrgetter(required)(config):
            raise ConfigError(f"{required} is empty; allowed: the path of a folder")
    for name in ("quality", "safety", "factuality"):
        axis: AxisConfig | QualityConfig = getattr(config.teacher.generative, name)
        if axis.weight < 0 or axis.votes < 1:
            raise ConfigError(
                f"teacher.generative.{name} has weight {axis.weight} and {axis.votes} votes; "
                "allowed: weight 0 or more, at least 1 vote"
            )
    _check_sampling(config)
    _check_lengths(config)
    _check_buffer(config)
    _check_objective(config)
    check_endpoints(config)
    _check_workers(config)


def _check_source(source: SourceConfig, key: str) -> None:
    if not source.weight > 0:
        raise ConfigError(f"{key}.weight is {source.weight}; allowed: above 0")
    if source.eod < -1:
        raise ConfigError(f"{key}.eod is {source.eod}; allowed: a token id, or -1 (detected)")
    if (problem := unused_option(source, possible_formats(source))) is not None:
        raise ConfigError(f"{key}.{problem}")
    if key.startswith("evaluation.ngram_corpus") and source.weight != 1:
        raise ConfigError(f"{key}.weight is {source.weight}; allowed: 1, because all its documents are read once")


def _leaves(node: Any, kind: type[T], key: str = "") -> Iterator[tuple[str, T]]:
    """Every value of ``kind`` in the configuration with its dotted key."""
    if isinstance(node, kind):
        yield key, node
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _leaves(item, kind, f"{key}[{index}]")
    elif dataclasses.is_dataclass(node):
        for entry in dataclasses.fields(node):
            yield from _leaves(getattr(node, entry.name), kind, f"{key}.{entry.name}" if key else entry.name)


def _check_sampling(config: Config) -> None:
    for name, neutral in _NEUTRAL_SAMPLING.items():
        value = getattr(config.rollout, name)
        if value != neutral:
            raise ConfigError(
                f"rollout.{name} is {value}; allowed: {neutral}, because rollouts are trained on and a truncated "
                "distribution is not the policy's"
            )


def _check_lengths(config: Config) -> None:
    warn, stop = config.rollout.warn_logprob_gap, config.rollout.max_logprob_gap
    if warn > stop:
        raise ConfigError(f"rollout.warn_logprob_gap is {warn}; allowed: at most rollout.max_logprob_gap = {stop}")
    data = config.data
    if data.min_prefix > data.max_prefix:
        raise ConfigError(f"data.min_prefix is {data.min_prefix}; allowed: at most data.max_prefix = {data.max_prefix}")
    if config.train.global_batch % config.train.micro_batch:
        raise ConfigError(
            f"train.micro_batch is {config.train.micro_batch}; allowed: a divisor of "
            f"train.global_batch = {config.train.global_batch}"
        )
    if config.optimizer.warmup_steps >= config.train.steps:
        raise ConfigError(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}; allowed: below train.steps = "
            f"{config.train.steps}"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr is {config.optimizer.min_lr}; allowed: at most optimizer.lr = {config.optimizer.lr}"
        )


def _check_buffer(config: Config) -> None:
    settings = config.buffer
    address = parse_url(settings.url) if settings.url else None
    if settings.name:
        check_name(settings.name)
    if settings.password_file and not isinstance(address, RedisAddress):
        raise ConfigError(
            f"buffer.password_file is {settings.password_file}; allowed: empty, because buffer.url is not redis://"
        )


def _check_objective(config: Config) -> None:
    if not config.data.sources:
        raise ConfigError("data.sources is empty; give at least one source with a path")
    check_objective(config.objective)
    facts = objective_facts(config)
    _check_candidates(config, facts)
    if facts.on_policy and config.rollout.temperature != 1.0:
        raise ConfigError(
            f"rollout.temperature is {config.rollout.temperature}; allowed: 1.0, because objective.name="
            f"{config.objective.name} follows the gradient of the distribution that was sampled from"
        )
    _check_curriculum(config, facts)
    _check_judge(config)


def _check_candidates(config: Config, facts: ObjectiveFacts) -> None:
    """The objective gets the candidates that it learns from, and none that cost something for nothing."""
    offered, objective = config.candidates, f"objective.name={config.objective.name}"
    for source in (Source.ORIGINAL, Source.REWRITE):
        key, given, used = f"candidates.{source.value}", getattr(offered, source.value), source in facts.trains_on
        if facts.on_policy and given:
            raise ConfigError(
                f"{key} is true; allowed: false, because {objective} trains on what the policy sampled itself and "
                f"could never train on the {source.value}"
            )
        if used and not facts.needs_judge and not given:
            raise ConfigError(f"{key} is false; allowed: true, because {objective} trains on it")
    if offered.rollouts < facts.least_rollouts:
        why = "learns from rollouts of the current policy" if facts.needs_judge else "trains on rollouts"
        why = "compares the rollouts of an episode with each other" if facts.least_rollouts > 1 else why
        raise ConfigError(
            f"candidates.rollouts is {offered.rollouts}; allowed: at least {facts.least_rollouts}, because {objective} "
            f"{why}"
        )
    count = int(offered.original) + int(offered.rewrite) + offered.rollouts
    if count < facts.least_candidates:
        raise ConfigError(
            f"candidates offers {count} candidate(s) per episode; allowed: at least {facts.least_candidates}, because "
            f"{objective} compares them"
        )
    # The original costs nothing, and a judge may compare a candidate with others that are never trained on.
    idle = (offered.rewrite and Source.REWRITE not in facts.trains_on) or (
        offered.rollouts > 0 and Source.ROLLOUT not in facts.trains_on
    )
    if idle and not facts.needs_judge:
        raise ConfigError(
            f"candidates (rewrite={offered.rewrite}, rollouts={offered.rollouts}) offers what {objective} never looks "
            "at; set rewrite=false and rollouts=0 where they are unused"
        )


def _check_judge(config: Config) -> None:
    axes = config.teacher.generative
    generative = needs_judge(config) and config.teacher.judge == JudgeName.generative
    if generative and not any(axis.weight for axis in (axes.quality, axes.safety, axes.factuality)):
        raise ConfigError("teacher.generative has no axis with a weight above 0; allowed: at least one")
    if generative and axes.max_tokens >= config.teacher.max_context:
        raise ConfigError(
            f"teacher.generative.max_tokens is {axes.max_tokens}; allowed: below teacher.max_context = "
            f"{config.teacher.max_context}, because the prompt has to fit as well"
        )


def _check_workers(config: Config) -> None:
    """A key has a name, metrics an address; a model in the worker itself scores likelihood and does nothing else."""
    if config.teacher.workers.key_env and not is_variable(config.teacher.workers.key_env):
        raise ConfigError(no_variable("teacher.workers.key_env"))
    if not (host := config.teacher.workers.metrics_host).strip():
        raise ConfigError(f"teacher.workers.metrics_host is {host!r}; allowed: an address of this machine")
    if not config.teacher.workers.own_model:
        return
    other = "teacher.judge=generative" if config.teacher.judge == JudgeName.generative else ""
    other = "candidates.rewrite=true" if config.candidates.rewrite else other
    if other:
        raise ConfigError(
            f"teacher.workers.own_model is true; allowed: false, because {other} needs a server that generates text"
        )


def _check_curriculum(config: Config, facts: ObjectiveFacts) -> None:
    """While there are no rollouts yet, the rest has to be enough to learn from."""
    name, offered = config.objective.name, config.candidates
    start = offered.curriculum.start
    if not offered.curriculum.enabled:
        return
    if not facts.needs_judge:
        raise ConfigError(
            f"candidates.curriculum.enabled is true; allowed: false, because objective.name={name} has no judge "
            "to say how often rollouts win"
        )
    if facts.on_policy:
        raise ConfigError(
            f"candidates.curriculum.enabled is true; allowed: false, because objective.name={name} offers nothing but "
            "rollouts, which then win always"
        )
    least = max(0, 2 - int(offered.original) - int(offered.rewrite))
    if not least <= start <= offered.rollouts:
        raise ConfigError(
            f"candidates.curriculum.start is {start}; allowed: {least} (two candidates per episode) to "
            f"candidates.rollouts = {offered.rollouts}"
        )
    if least == 2:
        raise ConfigError(
            "candidates.curriculum.enabled is true; allowed: false without candidates.original or candidates.rewrite, "
            "because rollouts then win always"
        )
