"""Agreement between fields, checked before anything heavy loads; the bounds of single fields are in the schema."""

from __future__ import annotations

import operator

from megatron_rlpt.config.buffer_address import RedisAddress, check_name, parse_url
from megatron_rlpt.config.choices import RunIn
from megatron_rlpt.config.endpoints import check_endpoints, is_variable, no_variable
from megatron_rlpt.config.evaluation_judges import check_judges
from megatron_rlpt.config.evaluation_sets import check_sets
from megatron_rlpt.config.fields import check_values
from megatron_rlpt.config.judges import JUDGES, TeacherUse, check_judge, judge_facts
from megatron_rlpt.config.rewriters import check_rewriter, rewrites_by_asking
from megatron_rlpt.config.schema import Config
from megatron_rlpt.config.schema_data import SourceConfig
from megatron_rlpt.config.sources import possible_formats, unused_option
from megatron_rlpt.config.teacher_models import Role, RoleModel, check_rewriter_model, model_of
from megatron_rlpt.config.user_classes import check_reader, check_second_measure
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.extensions import is_extension
from megatron_rlpt.objectives import ObjectiveFacts, check_objective, facts_with
from megatron_rlpt.types import Source


def objective_facts(config: Config) -> ObjectiveFacts:
    """Return the facts of the run's objective."""
    return facts_with(config.objective)


def needs_judge(config: Config) -> bool:
    """Return whether the objective selects by reward, so that the run has a judge."""
    return objective_facts(config).needs_judge


def rows_per_example(config: Config) -> int:
    """Return the most sequences that an update trains on per episode."""
    offered = config.candidates
    return objective_facts(config).rows_per_example(
        original=offered.original, rewrite=offered.rewrite, rollouts=offered.rollouts
    )


def roles_asked(config: Config) -> tuple[Role, ...]:
    """Return the roles of the teacher in which a run asks a model: for input of a judge, for rewrites."""
    judged = needs_judge(config) and judge_facts(config).asks is not TeacherUse.nothing
    asked = {Role.judge: judged, Role.rewriter: rewrites_by_asking(config)}
    return tuple(role for role in Role if asked[role])


def models_asked(config: Config) -> tuple[RoleModel, ...]:
    """Return the models of the teacher that a run asks, each with the roles in which it does; one if they share it."""
    roles, found = roles_asked(config), list[RoleModel]()
    for role in roles:
        if not any(model.has(role) for model in found):
            found.append(model_of(config, role).asked_for(roles))
    return tuple(found)


def asks_teacher(config: Config) -> bool:
    """Return whether a run asks a model of the teacher for anything."""
    return bool(roles_asked(config))


def needs_engine(config: Config) -> bool:
    """Return whether a run generates: rollouts, or continuations to evaluate."""
    return config.candidates.rollouts > 0 or config.evaluation.every > 0


def judged_by_workers(config: Config) -> bool:
    """Return whether judge workers reward or rewrite the groups of a run."""
    return (needs_judge(config) or config.candidates.rewrite) and config.teacher.run_in is RunIn.workers


def validate(config: Config) -> None:
    """Check the bounds of every field and agreement between fields.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    check_values(config)
    for group in ("data.sources", "data.heldout", "evaluation.second_corpus"):
        for index, source in enumerate(operator.attrgetter(group)(config)):
            _check_source(source, f"{group}[{index}]")
    check_second_measure(config.evaluation)
    if config.evaluation.every and not config.data.heldout:
        raise ConfigError(f"evaluation.every is {config.evaluation.every}; allowed: 0, because data.heldout is empty")
    for required in ("run.dir", "model.path"):
        if not operator.attrgetter(required)(config):
            raise ConfigError(f"{required} is empty; set it to the path of a folder")
    _check_lengths(config)
    _check_buffer(config)
    _check_objective(config)
    check_endpoints(config)
    check_rewriter_model(config)
    check_judges(config)
    check_sets(config)
    _check_workers(config)


def _check_source(source: SourceConfig, key: str) -> None:
    check_reader(source, key)
    if (problem := unused_option(source, possible_formats(source))) is not None:
        raise ConfigError(f"{key}.{problem}")
    if key.startswith("evaluation.second_corpus") and source.weight != 1:
        raise ConfigError(f"{key}.weight is {source.weight}; allowed: 1, because all of its documents are read once")


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
        raise ConfigError("data.sources is empty; add at least one source with a path")
    check_objective(config.objective)
    facts = objective_facts(config)
    _check_reference(config, facts)
    _check_candidates(config, facts)
    if config.rollout.router_replay and not config.candidates.rollouts:
        raise ConfigError(
            "rollout.router_replay is true; allowed: false, because candidates.rollouts is 0 and nothing is recorded"
        )
    if facts.on_policy and config.rollout.temperature != 1.0:
        raise ConfigError(
            f"rollout.temperature is {config.rollout.temperature}; allowed: 1.0, because objective.name="
            f"{config.objective.name} follows the gradient of the sampled distribution"
        )
    _check_curriculum(config, facts)
    _check_judge(config)
    check_rewriter(config)


def _check_reference(config: Config, facts: ObjectiveFacts) -> None:
    """Check that a pull to the reference, where one is set, has an effect."""
    objective = config.objective
    takes_kl = "kl" in facts.settings
    if objective.kl and not takes_kl:
        raise ConfigError(
            f"objective.kl is {objective.kl}; allowed: 0, because objective.name={objective.name} does not add it to "
            "its loss"
        )
    if takes_kl and objective.reference_refresh and not facts.needs_reference:
        raise ConfigError(
            f"objective.reference_refresh is {objective.reference_refresh}; allowed: 0, because objective.name="
            f"{objective.name} has no reference while objective.kl is 0"
        )


def _check_candidates(config: Config, facts: ObjectiveFacts) -> None:
    """Check that the objective gets the candidates it learns from, and none that cost time for nothing."""
    offered, objective = config.candidates, f"objective.name={config.objective.name}"
    for source in (Source.ORIGINAL, Source.REWRITE):
        key, given, used = f"candidates.{source.value}", getattr(offered, source.value), source in facts.trains_on
        if facts.on_policy and given:
            raise ConfigError(
                f"{key} is true; allowed: false, because {objective} trains on the policy's own samples and "
                f"cannot train on the {source.value}"
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
            f"candidates (rewrite={offered.rewrite}, rollouts={offered.rollouts}) offers candidates that {objective} "
            "does not use; set rewrite=false and rollouts=0 where they are unused"
        )


def _check_judge(config: Config) -> None:
    check_judge(config)
    _check_prompts(config)
    axes = config.teacher.generative.asked()
    generative = needs_judge(config) and judge_facts(config).has_axes
    if generative and not any(axis.weight for axis in (axes.quality, axes.safety, axes.factuality)):
        raise ConfigError("teacher.generative has no axis with a weight above 0; allowed: at least one")
    if generative and axes.max_tokens >= config.teacher.max_context:
        raise ConfigError(
            f"teacher.generative.max_tokens is {axes.max_tokens}; allowed: below teacher.max_context = "
            f"{config.teacher.max_context}, because the prompt must fit as well"
        )


def _check_prompts(config: Config) -> None:
    """Check that prompts meet a reward that knows their labels, and documents one that does not need any."""
    kinds = {key: {source.prompts for source in getattr(config.data, key)} for key in ("sources", "heldout")}
    if True in kinds["sources"] and config.candidates.rewrite:
        raise ConfigError("candidates.rewrite is true; allowed: false, because data.sources has prompts, not documents")
    if not needs_judge(config):
        return
    name, needs_labels = config.teacher.judge, judge_facts(config).needs_labels
    if needs_labels and False in kinds["sources"]:
        raise ConfigError(
            f"teacher.judge is {name}, which rewards answers to prompts, and data.sources has documents; set "
            "prompts: true for sources of prompts (rlpt teacher data), or choose another judge"
        )
    if True in kinds["sources"] and not needs_labels and not is_extension(name):
        labelled = ", ".join(known for known, facts in JUDGES.items() if facts.needs_labels)
        raise ConfigError(
            f"teacher.judge is {name}; allowed: {labelled} or your own class, because data.sources has prompts"
        )
    if config.evaluation.every and kinds["sources"] != kinds["heldout"]:
        raise ConfigError(
            "data.sources has prompts and data.heldout documents, or the other way round; evaluation.every needs the "
            "same in both"
        )


def _check_workers(config: Config) -> None:
    """Check names of variables and addresses, and that a worker with its own model only scores likelihood."""
    if config.teacher.workers.key_env and not is_variable(config.teacher.workers.key_env):
        raise ConfigError(no_variable("teacher.workers.key_env"))
    if not (host := config.teacher.workers.metrics_host).strip():
        raise ConfigError(f"teacher.workers.metrics_host is {host!r}; allowed: an address of this machine")
    if not config.teacher.workers.own_model:
        return
    facts = judge_facts(config)
    if facts.asks is TeacherUse.nothing and not rewrites_by_asking(config):
        raise ConfigError(
            f"teacher.workers.own_model is true; allowed: false, because teacher.judge={config.teacher.judge} asks no "
            "model"
        )
    other = "" if facts.runs_in_worker else f"teacher.judge={config.teacher.judge}"
    other = "candidates.rewrite=true" if rewrites_by_asking(config) else other
    if other:
        raise ConfigError(
            f"teacher.workers.own_model is true; allowed: false, because {other} needs a server that generates text"
        )


def _check_curriculum(config: Config, facts: ObjectiveFacts) -> None:
    """Check that the candidates before the first rollouts are enough to learn from."""
    name, offered = config.objective.name, config.candidates
    start = offered.curriculum.start
    if not offered.curriculum.enabled:
        return
    if not facts.needs_judge:
        raise ConfigError(
            f"candidates.curriculum.enabled is true; allowed: false, because objective.name={name} has no judge "
            "to count how often rollouts win"
        )
    if facts.on_policy:
        raise ConfigError(
            f"candidates.curriculum.enabled is true; allowed: false, because objective.name={name} offers only "
            "rollouts, which then always win"
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
            "because rollouts then always win"
        )
