"""Clients of the servers of one model of the teacher, and what servers must not share where there are two models."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_rlpt.config import Config, RoleModel
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.judge_workers.client.endpoint import Endpoint
from megatron_rlpt.judge_workers.client.pool import TeacherPool
from megatron_rlpt.judge_workers.discovery import servers_of
from megatron_rlpt.models.adapters import special_tokens_of


def open_pool(config: Config, model: RoleModel, announced: Mapping[str, str]) -> TeacherPool:
    """Return the pool of the servers of ``model``, an asynchronous context manager."""
    # With the model's folder, break up its own special tokens; without it, only the common ones.
    known = special_tokens_of(model.path)
    deadline = config.teacher.workers.request_deadline
    return TeacherPool(servers_of(config, model, announced), deadline, known, model=model)


def require_two_models(config: Config, pools: Mapping[RoleModel, TeacherPool]) -> None:
    """Check that servers of the rewriter do not serve the judge's model, where both are folders of their own.

    Compares what servers say they have loaded (vLLM lists the folder), not names: two exports are both ``export``.

    Raises:
        ConfigError: names the server and both models.
    """
    if len(pools) < 2 or not all(model.path for model in pools):
        return
    (one, judges), (other, rewriters) = pools.items()
    for endpoint in rewriters.endpoints:
        twin = next((judge for judge in judges.endpoints if _loaded_the_same(endpoint, judge)), None)
        if twin is not None:
            raise ConfigError(
                f"the {other.who}'s server {endpoint.url} serves {endpoint.root}, the model of the {one.who}'s server "
                f"{twin.url}, but {one.key} is {one.path} and {other.key} {other.path}; correct the servers (rlpt "
                f"teacher serve --role {other.who}), or leave {other.key} empty if both roles have one model"
            )


def _loaded_the_same(one: Endpoint, other: Endpoint) -> bool:
    return bool(one.root) and one.model == other.model and os.path.normpath(one.root) == os.path.normpath(other.root)
