"""Components of a run on a cluster, and the resources of each.

buffer     1 process, if the launch starts Redis
teacher    servers of the teacher, on their own nodes
rewriter   servers of the rewriter's model, if it has one of its own, on further nodes
judges     worker processes, on the node of the first server (without servers: of the trainer)
trainer    one process per rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster import Allocation, Cluster, ExecutorName
from launch.code import CONFIG
from launch.spec import ServerSpec, Spec
from megatron_rlpt.config import (
    Config,
    Role,
    RoleModel,
    SourceConfig,
    SourceFormat,
    judged_by_workers,
    models_asked,
    rewriter_has_own_model,
)
from megatron_rlpt.errors import ConfigError


@dataclass(frozen=True)
class Component:
    """Processes of one role."""

    role: str
    nodes: int
    tasks_per_node: int
    first_node: int = 0
    """Index of its first node, among those of the job."""
    gpus_per_node: int = 0
    gpu_type: str = ""
    cpus_per_task: int = 0
    """0 leaves it to the cluster."""
    memory: str = ""

    @property
    def tasks(self) -> int:
        """Return the number of its processes."""
        return self.nodes * self.tasks_per_node


def components_of(cluster: Cluster, config: Config) -> list[Component]:
    """Return the components in the order of their start; nodes of servers come after the trainer's.

    Raises:
        ConfigError: the run's configuration and the cluster file do not fit together.
    """
    trainer = cluster.trainer
    trainer_component = Component(
        "trainer",
        trainer.nodes,
        trainer.ranks_per_node,
        0,
        trainer.gpus_per_node,
        trainer.gpu_type,
        trainer.cpus_per_rank,
        trainer.memory,
    )
    if not judged_by_workers(config):
        _refuse_idle(cluster)
        return [trainer_component]
    if cluster.executor is ExecutorName.slurm and not (config.buffer.url or cluster.buffer.redis):
        raise ConfigError(
            "buffer.url of the run is empty and buffer.redis of the cluster file false, and SQLite is for one machine; "
            "set buffer.redis: true in the cluster file, or buffer.url in the run's configuration"
        )
    if config.buffer.url and cluster.buffer.redis:
        raise ConfigError(
            f"buffer.url is {config.buffer.url}, and buffer.redis of the cluster file starts another; set only one"
        )
    if cluster.judges.workers < 1:
        raise ConfigError("judges.workers is 0 and teacher.run_in workers; allowed: 1 worker or more")
    _check_servers(cluster, config)
    # One machine is one node.
    apart = cluster.executor is ExecutorName.slurm and any(one.nodes for one in cluster.servers.values())
    first = node = trainer.nodes if apart else 0
    found = []
    if cluster.buffer.redis:
        found.append(Component("buffer", 1, 1, first))
    for section, servers in cluster.servers.items():
        if servers.nodes:
            found.append(
                Component(
                    section,
                    servers.nodes,
                    servers.servers_per_node,
                    node,
                    servers.gpus_per_node,
                    servers.gpu_type,
                    servers.cpus_per_server,
                    servers.memory,
                )
            )
            node += servers.nodes if apart else 0
    return [*found, Component("judges", 1, 1, first, cpus_per_task=cluster.judges.cpus), trainer_component]


def _check_servers(cluster: Cluster, config: Config) -> None:
    """Raise ConfigError for a model that the run asks and nothing serves, and for servers that it would not ask."""
    own_model = config.teacher.workers.own_model
    if cluster.teacher.nodes and own_model:
        raise ConfigError("teacher.workers.own_model is true and teacher.nodes of the cluster file above 0; allowed: 0")
    models = {_section_of(model): model for model in models_asked(config)}
    for section, servers in cluster.servers.items():
        model = models.get(section)
        if model is None:
            if servers.nodes:
                idle = (
                    "the run's rewriter has no model of its own (teacher.rewriter.path)"
                    if section == "rewriter"
                    else "the run asks it nothing"
                )
                raise ConfigError(f"{section}.nodes of the cluster file is {servers.nodes}; allowed: 0, because {idle}")
        elif servers.nodes and not model.path:
            raise ConfigError(
                f"{section}.nodes of the cluster file is {servers.nodes} and {model.key} of the run empty; set it to "
                "the folder of the model to serve"
            )
        elif not (servers.nodes or model.endpoints or own_model):
            raise ConfigError(
                f"no server of the {model.who}: set {section}.nodes in the cluster file, or {model.endpoints_key}"
                f"{'' if model.who == Role.rewriter else ' or own_model'} in the run's configuration"
            )


def _section_of(model: RoleModel) -> str:
    return "rewriter" if model.who == Role.rewriter else "teacher"


def spec_of(cluster: Cluster, config: Config, components: list[Component]) -> Spec:
    """Return the settings for the components."""
    separate = rewriter_has_own_model(config)
    servers = {
        section: ServerSpec(
            one.servers_per_node,
            one.gpus_per_node // one.servers_per_node,
            one.concurrency,
            tuple(one.arguments),
            {"teacher": Role.judge, "rewriter": Role.rewriter}[section] if separate else "",
        )
        for section, one in cluster.servers.items()
        if one.nodes
    }
    return Spec(
        run_dir=config.run.dir,
        config=CONFIG,
        components=tuple(component.role for component in components),
        environment=cluster.environment,
        secrets_file=cluster.secrets_file,
        redis_port=cluster.buffer.port,
        trainer_gpus=cluster.trainer.gpus_per_node,
        servers=servers,
        judge_workers=cluster.judges.workers,
        ranks_per_node=cluster.trainer.ranks_per_node,
        restart_trainer=cluster.trainer.restart,
        gate=cluster.guards.gate,
        one_machine=cluster.executor is ExecutorName.local,
        generates_key=bool(servers) and not config.teacher.workers.key_env,
        separate=is_separate(cluster, components),
    )


def is_separate(cluster: Cluster, components: Sequence[Component]) -> bool:
    """Return whether judging and training are separate jobs; a run that judges in its trainer is one job."""
    slurm = cluster.executor is ExecutorName.slurm
    return slurm and cluster.slurm.allocation is Allocation.separate and len(components) > 1


def with_absolute_paths(config: Config, here: Path, *, elsewhere: bool) -> Config:
    """Return ``config`` for processes with another working directory.

    Args:
        config: of the run.
        here: folder that relative paths refer to.
        elsewhere: the cluster is another machine, where relative paths mean nothing.

    Raises:
        ConfigError: a path is relative, and the cluster is elsewhere.
    """

    def absolute(key: str, path: str) -> str:
        if not path or Path(path).is_absolute():
            return path
        if elsewhere:
            raise ConfigError(f"{key} is {path}; allowed on a cluster reached by tunnel: an absolute path there")
        return str(here / path)

    def sources(key: str, entries: list[SourceConfig]) -> list[SourceConfig]:
        return [
            # Other values are names on a hub.
            entry
            if (entry.reader or entry.format is SourceFormat.hf) and not (here / entry.path).exists()
            else replace(entry, path=absolute(f"{key}[{number}].path", entry.path))
            for number, entry in enumerate(entries)
        ]

    return replace(
        config,
        run=replace(config.run, dir=absolute("run.dir", config.run.dir)),
        model=replace(config.model, path=absolute("model.path", config.model.path)),
        teacher=replace(
            config.teacher,
            path=absolute("teacher.path", config.teacher.path),
            rewriter=replace(
                config.teacher.rewriter, path=absolute("teacher.rewriter.path", config.teacher.rewriter.path)
            ),
        ),
        data=replace(
            config.data,
            sources=sources("data.sources", config.data.sources),
            heldout=sources("data.heldout", config.data.heldout),
        ),
        buffer=replace(config.buffer, password_file=absolute("buffer.password_file", config.buffer.password_file)),
        evaluation=replace(
            config.evaluation,
            second_corpus=sources("evaluation.second_corpus", config.evaluation.second_corpus),
            sets=[
                replace(one, path=absolute(f"evaluation.sets[{number}].path", one.path))
                for number, one in enumerate(config.evaluation.sets)
            ],
            judges=[
                replace(one, path=absolute(f"evaluation.judges[{number}].path", one.path))
                for number, one in enumerate(config.evaluation.judges)
            ],
        ),
    )


def _refuse_idle(cluster: Cluster) -> None:
    """Raise ConfigError for components that a run without judge workers would not use."""
    idle = {f"{section}.nodes": one.nodes > 0 for section, one in cluster.servers.items()}
    idle["buffer.redis"] = cluster.buffer.redis
    for key in (key for key, requested in idle.items() if requested):
        raise ConfigError(
            f"{key} of the cluster file is set, but the run judges in its trainer; set teacher.run_in: workers in "
            "the run's configuration, or remove it from the cluster file"
        )
