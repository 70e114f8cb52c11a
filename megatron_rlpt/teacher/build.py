"""Build the teacher of a run from its configuration: one engine for both roles, and only what the run needs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlpt.config import Config, TeacherUse, judge_facts, needs_judge
from megatron_rlpt.config.rewriters import PROMPTED, rewrites_by_asking
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.teacher.batched import BatchedRewriter
from megatron_rlpt.teacher.distributed import DistributedJudge, DistributedRewriter
from megatron_rlpt.teacher.extension_judges import NoTeacher
from megatron_rlpt.teacher.extension_rewriters import build_extension_rewriter
from megatron_rlpt.teacher.generator import TextGenerator
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.judges import builder_of
from megatron_rlpt.teacher.rewriter import BatchRewriter, EpisodeRewriter, Rewriter, answer_tokens
from megatron_rlpt.tokens.control_tokens import known_special_tokens
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
    prompted = judged and judge_facts(config).asks is TeacherUse.text
    judge: Judge | None = None
    rewriter: BatchRewriter | None = None
    if ranks.is_leader:
        generator = start_generator(config, ranks) if prompted or rewrites_by_asking(config) else None
        judge = build_judge(config, device, generator) if judged else None
        rewriter = BatchedRewriter(build_rewriter(config), generator or NoTeacher()) if rewrites else None
    if ranks.size == 1:
        return Teacher(judge, rewriter)
    return Teacher(
        DistributedJudge(judge, ranks) if judged else None, DistributedRewriter(rewriter, ranks) if rewrites else None
    )


def start_generator(config: Config, ranks: Ranks) -> TextGenerator:
    """Start the teacher's engine in this process, or beside it in a world of several ranks.

    Raises:
        ModelError: the teacher cannot be served.
    """
    from megatron_rlpt.teacher.vllm_generator import VllmGenerator

    teacher = config.teacher
    return VllmGenerator(
        config.teacher_path,
        teacher.max_context,
        teacher.kv_cache_gib,
        in_process=ranks.size == 1,
        dtype=teacher.dtype,
    )


def build_judge(config: Config, device: str, generator: TextGenerator | None = None) -> Judge:
    """Build the judge named by ``teacher.judge``; one that asks for text starts an engine unless given ``generator``.

    Raises:
        ModelError: the teacher cannot be used, or its vocabulary differs from the policy's.
    """
    return builder_of(config).in_trainer(config, device, lambda: generator or start_generator(config, Ranks()))


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
        known_special_tokens(config.teacher_path),
    )
