"""Build the teacher of a run from its configuration: one engine per model, and only what the run needs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlpt.config import (
    Config,
    Role,
    RoleModel,
    TeacherUse,
    judge_facts,
    model_of,
    models_asked,
    needs_judge,
)
from megatron_rlpt.config.rewriters import PROMPTED
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.models.adapters import special_tokens_of
from megatron_rlpt.teacher.batched import BatchedRewriter
from megatron_rlpt.teacher.distributed import DistributedJudge, DistributedRewriter
from megatron_rlpt.teacher.extension_judges import NoTeacher
from megatron_rlpt.teacher.extension_rewriters import build_extension_rewriter
from megatron_rlpt.teacher.generator import TextGenerator
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.judges import builder_of
from megatron_rlpt.teacher.rewriter import BatchRewriter, EpisodeRewriter, Rewriter, answer_tokens
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer


@dataclass(frozen=True)
class Teacher:
    """The teacher's roles; None for a role that the run does not use."""

    judge: Judge | None
    rewriter: BatchRewriter | None


def build_teacher(config: Config, device: str, ranks: Ranks) -> Teacher:
    """Load a judge if the objective compares candidates, and a rewriter if rewrites are enabled.

    Args:
        config: the run's configuration.
        device: torch device of the likelihood judge; the engine of a generative teacher chooses its own.
        ranks: all ranks of the run; only leaders load anything.

    Raises:
        ModelError: a model or tokenizer cannot be used, or the teacher's vocabulary differs from the policy's.
    """
    judged = needs_judge(config)
    rewrites = config.candidates.rewrite
    judge: Judge | None = None
    rewriter: BatchRewriter | None = None
    if ranks.is_leader:
        engines = _start_engines(config, ranks)
        judge = build_judge(config, device, engines.get(Role.judge)) if judged else None
        rewriter = (
            BatchedRewriter(build_rewriter(config), engines.get(Role.rewriter, NoTeacher())) if rewrites else None
        )
    if ranks.size == 1:
        return Teacher(judge, rewriter)
    return Teacher(
        DistributedJudge(judge, ranks) if judged else None, DistributedRewriter(rewriter, ranks) if rewrites else None
    )


def _start_engines(config: Config, ranks: Ranks) -> dict[Role, TextGenerator]:
    """Start one engine for every model that is asked for text; roles that share a model share its engine."""
    engines: dict[Role, TextGenerator] = {}
    for model in models_asked(config):
        texts = [role for role in model.roles if role is Role.rewriter or judge_facts(config).asks is TeacherUse.text]
        if texts:
            engines |= dict.fromkeys(texts, start_generator(config, model, ranks))
    return engines


def start_generator(config: Config, model: RoleModel, ranks: Ranks) -> TextGenerator:
    """Start the engine of a model of the teacher in this process, or beside it in a world of several ranks.

    Raises:
        ModelError: the model cannot be served.
    """
    from megatron_rlpt.teacher.vllm_generator import VllmGenerator

    return VllmGenerator(
        model.path,
        model.max_context,
        config.teacher.kv_cache_gib,
        in_process=ranks.size == 1,
        dtype=config.teacher.dtype,
        key=model.key,
        context_key=model.context_key,
    )


def build_judge(config: Config, device: str, generator: TextGenerator | None = None) -> Judge:
    """Build the judge named by ``teacher.judge``; one that asks for text starts an engine unless given ``generator``.

    Raises:
        ModelError: the teacher cannot be used, or its vocabulary differs from the policy's.
    """
    return builder_of(config).in_trainer(
        config, device, lambda: generator or start_generator(config, model_of(config, Role.judge), Ranks())
    )


def describe_judge(config: Config) -> str:
    """Return a phrase that completes "the judge is"."""
    return builder_of(config).describe(config)


def build_rewriter(config: Config) -> EpisodeRewriter:
    """Build the rewriter that ``teacher.rewriter.name`` names, whichever generator serves it.

    Raises:
        ConfigError: a class of the user's cannot be built.
        ModelError: the policy's tokenizer cannot be used.
    """
    if config.teacher.rewriter.name != PROMPTED:
        return build_extension_rewriter(config)
    return Rewriter(
        PolicyTokenizer(config.model.path),
        config.teacher.rewriter,
        config.data.suffix_length,
        config.run.seed,
        answer_tokens(config),
        special_tokens_of(model_of(config, Role.rewriter).path),
    )
