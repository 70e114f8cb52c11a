"""Where a path inside a container is on its node. Batch scripts run on nodes, components in containers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from launch.cluster import Cluster
from megatron_rlpt.config import Config
from megatron_rlpt.errors import ConfigError


def on_node(path: str, cluster: Cluster) -> str:
    """``path``, as components know it, as the node knows it.

    Raises:
        ConfigError: components run in a container that does not have it.
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
    """Raises ConfigError: components would look for something that their container does not have."""
    for path in filter(None, _paths(cluster, config)):
        on_node(path, cluster)


def _paths(cluster: Cluster, config: Config) -> Iterable[str]:
    yield from (config.run.dir, config.model.path, config.teacher.path, config.buffer.password_file)
    yield cluster.secrets_file
    for source in config.data.sources:
        # A name on a hub is none of a file.
        yield source.path if PurePosixPath(source.path).is_absolute() else ""
