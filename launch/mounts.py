"""Translation of paths in a container to paths on its node: batch scripts run on nodes, components in containers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from launch.cluster import Cluster
from megatron_rlpt.config import Config
from megatron_rlpt.errors import ConfigError


def on_node(path: str, cluster: Cluster) -> str:
    """Return the node's path for a path of the components.

    Raises:
        ConfigError: components run in a container without it.
    """
    if not cluster.container.image:
        return path
    for mount in cluster.container.mounts:
        source, _, rest = mount.partition(":")
        inside = PurePosixPath(rest.partition(":")[0] or source)
        if PurePosixPath(path).is_relative_to(inside):
            return str(PurePosixPath(source) / PurePosixPath(path).relative_to(inside))
    mounts = ", ".join(cluster.container.mounts) or "none"
    raise ConfigError(f"{path} is under none of container.mounts ({mounts}); add the mount of a folder above it")


def check_mounts(cluster: Cluster, config: Config) -> None:
    """Raise ConfigError if components would look for a file that their container does not have."""
    for path in filter(None, _paths(cluster, config)):
        on_node(path, cluster)


def _paths(cluster: Cluster, config: Config) -> Iterable[str]:
    yield from (config.run.dir, config.model.path, config.teacher.path, config.teacher.rewriter.path)
    yield from (config.buffer.password_file, cluster.secrets_file)
    for source in config.data.sources:
        # Other values are names on a hub.
        yield source.path if PurePosixPath(source.path).is_absolute() else ""
