"""The models behind the teacher's two roles: one model for judge and rewriter, or one for each."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_rlpt.config.choices import RunIn
from megatron_rlpt.config.rewriters import KEY as REWRITER
from megatron_rlpt.config.rewriters import rewrites_by_asking
from megatron_rlpt.config.schema import Config
from megatron_rlpt.config.schema_teacher import EndpointConfig
from megatron_rlpt.errors import ConfigError


class Role(enum.StrEnum):
    """What a model of the teacher is asked for."""

    judge = "judge"
    rewriter = "rewriter"


@dataclass(frozen=True)
class RoleModel:
    """A model of the teacher, where it is, and what it is asked for."""

    roles: tuple[Role, ...]
    """Both for a model that is shared."""
    who: str
    """How messages call it: ``teacher`` while there is one model, else its role."""
    path: str
    """Hugging Face folder; empty for a model that only its servers know."""
    key: str
    """Configuration key of the folder."""
    max_context: int
    """Maximum length of prompt plus answer, in tokens."""
    context_key: str
    """Configuration key of that length."""
    endpoints: tuple[EndpointConfig, ...] = field(hash=False)
    """Its configured servers; others are announced in the rollout buffer."""
    endpoints_key: str
    """Configuration key of the servers."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return Path(self.path).resolve().name if self.path else ""

    def has(self, role: Role) -> bool:
        """Return whether it is asked for ``role``."""
        return role in self.roles

    def asked_for(self, roles: tuple[Role, ...]) -> RoleModel:
        """Return the model with those of its roles that are among ``roles``."""
        return replace(self, roles=tuple(role for role in self.roles if role in roles))


def rewriter_has_own_model(config: Config) -> bool:
    """Return whether judge and rewriter are two models, or one model on servers of their own."""
    rewriter = config.teacher.rewriter
    return bool(rewriter.endpoints) or (bool(rewriter.path) and not _same(rewriter.path, config.teacher_path))


def model_of(config: Config, role: Role) -> RoleModel:
    """Return the model that has ``role``, with all of its roles, whether or not the run asks it."""
    teacher, rewriter = config.teacher, config.teacher.rewriter
    separate = rewriter_has_own_model(config)
    if separate and role is Role.rewriter:
        return RoleModel(
            (Role.rewriter,),
            Role.rewriter,
            rewriter.path,
            "teacher.rewriter.path",
            rewriter.max_context or teacher.max_context,
            "teacher.rewriter.max_context" if rewriter.max_context else "teacher.max_context",
            tuple(rewriter.endpoints),
            "teacher.rewriter.endpoints",
        )
    return RoleModel(
        (Role.judge,) if separate else tuple(Role),
        Role.judge if separate else "teacher",
        config.teacher_path,
        "teacher.path",
        teacher.max_context,
        "teacher.max_context",
        tuple(teacher.workers.endpoints),
        "teacher.workers.endpoints",
    )


def check_rewriter_model(config: Config) -> None:
    """Check the options that give the rewriter a model of its own.

    Raises:
        ConfigError: nothing would use them, or both roles would ask the same model of the same server as if it were
            two.
    """
    rewriter = config.teacher.rewriter
    given = {
        "path": (rewriter.path, "empty"),
        "max_context": (rewriter.max_context, "0"),
        "endpoints": (len(rewriter.endpoints), "none"),
    }
    for name, (value, allowed) in given.items():
        if value and not rewrites_by_asking(config):
            why = f"{REWRITER}={rewriter.name} asks no model" if config.candidates.rewrite else _NO_REWRITES
            raise ConfigError(f"{_said(name, value)}; allowed: {allowed}, because {why}")
    if rewriter.endpoints and config.teacher.run_in is RunIn.trainer:
        raise ConfigError(
            f"{_said('endpoints', len(rewriter.endpoints))}; allowed: none with teacher.run_in=trainer, where the "
            "trainer loads the model of teacher.rewriter.path; set teacher.run_in=workers, or remove them"
        )
    if rewriter.max_context and not rewriter_has_own_model(config):
        raise ConfigError(
            f"{_said('max_context', rewriter.max_context)}; allowed: 0, because the rewriter has the judge's model; "
            "set teacher.max_context, or teacher.rewriter.path to another model"
        )
    _check_servers(config)


def _check_servers(config: Config) -> None:
    judges = {(one.url.rstrip("/"), one.model) for one in config.teacher.workers.endpoints}
    for index, endpoint in enumerate(config.teacher.rewriter.endpoints):
        if (endpoint.url.rstrip("/"), endpoint.model) in judges:
            raise ConfigError(
                f"teacher.rewriter.endpoints[{index}] is {endpoint.url}"
                f"{f' with model {endpoint.model}' if endpoint.model else ''}, which teacher.workers.endpoints has "
                "for the judge; name the model of each, or leave teacher.rewriter.endpoints empty if both roles have "
                "one model"
            )


def _said(name: str, value: object) -> str:
    verb = f"has {value} server(s)" if name == "endpoints" else f"is {value}"
    return f"teacher.rewriter.{name} {verb}"


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


_NO_REWRITES = "candidates.rewrite is false"
