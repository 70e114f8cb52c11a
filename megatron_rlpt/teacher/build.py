"""Build the teacher of a run from its configuration: one engine for both roles, and only what the run needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rlpt.config import Config, JudgeName, PairScheme, needs_judge
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ModelError
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher.batched import BatchedJudge, BatchedRewriter
from megatron_rlpt.teacher.distributed import DistributedJudge, DistributedRewriter
from megatron_rlpt.teacher.generative import GenerativeJudge
from megatron_rlpt.teacher.generator import TextGenerator
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.rewriter import BatchRewriter, Rewriter, answer_tokens
from megatron_rlpt.tokens.control_tokens import known_special_tokens
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, load_tokenizer

_log = get_logger(__name__)


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
    prompted = judged and config.teacher.judge == JudgeName.generative
    judge: Judge | None = None
    rewriter: BatchRewriter | None = None
    if ranks.is_leader:
        generator = _build_generator(config, ranks) if prompted or rewrites else None
        judge = build_judge(config, device, generator) if judged else None
        rewriter = BatchedRewriter(build_rewriter(config), generator) if generator and rewrites else None
    if ranks.size == 1:
        return Teacher(judge, rewriter)
    return Teacher(
        DistributedJudge(judge, ranks) if judged else None, DistributedRewriter(rewriter, ranks) if rewrites else None
    )


def _build_generator(config: Config, ranks: Ranks) -> TextGenerator:
    from megatron_rlpt.teacher.vllm_generator import VllmGenerator

    teacher = config.teacher
    return VllmGenerator(config.teacher_path, teacher.max_context, teacher.kv_cache_gib, in_process=ranks.size == 1)


def build_judge(config: Config, device: str, generator: TextGenerator | None = None) -> Judge:
    """Build the judge named by ``teacher.judge``; a generative one starts an engine unless given ``generator``.

    Raises:
        ModelError: the teacher cannot be used, or its vocabulary differs from the policy's.
    """
    if config.teacher.judge == JudgeName.generative:
        generator = generator or _build_generator(config, Ranks())
        return BatchedJudge(build_generative_judge(config, generator.name), generator)
    from megatron_rlpt.teacher.likelihood import LikelihoodJudge

    require_same_vocabulary(config)
    return LikelihoodJudge(config.teacher_path, config.teacher.likelihood, device)


def describe_judge(config: Config) -> str:
    """Return a phrase that completes "the judge is"."""
    name = Path(config.teacher_path).name
    if config.teacher.judge == JudgeName.generative:
        axes = config.teacher.generative
        used = [axis for axis in ("quality", "safety", "factuality") if getattr(axes, axis).weight]
        return f"{name}, prompted, on {' + '.join(used)}"
    likelihood = config.teacher.likelihood
    return (
        f"the mean log-likelihood under a frozen {name}, minus {likelihood.repetition_weight:g} times the share of "
        f"repeated {likelihood.repetition_ngram}-grams"
    )


def build_generative_judge(config: Config, teacher: str) -> GenerativeJudge:
    """Build the judge that prompts a model called ``teacher``, whichever generator serves it.

    Raises:
        ModelError: the policy's tokenizer cannot be used.
    """
    if config.teacher.generative.quality.scheme == PairScheme.pivot:
        _log.warning(
            "teacher.generative.quality.scheme=pivot compares all candidates with one, which hurts (paper: win rate "
            "84.3 -> 72.1 with 8 rollouts); use scheme=tournament to save calls without that loss"
        )
    return GenerativeJudge(teacher, PolicyTokenizer(config.model.path), config.teacher.generative, config.run.seed)


def build_rewriter(config: Config) -> Rewriter:
    """Build the rewriter, whichever generator serves it.

    Raises:
        ModelError: the policy's tokenizer cannot be used.
    """
    return Rewriter(
        PolicyTokenizer(config.model.path),
        config.teacher.rewriter,
        config.data.suffix_length,
        config.run.seed,
        answer_tokens(config),
        known_special_tokens(config.teacher_path),
    )


def require_same_vocabulary(config: Config) -> None:
    """Check the vocabularies unless the teacher is the policy's own starting model."""
    if Path(config.teacher_path).resolve() != Path(config.model.path).resolve():
        check_same_vocabulary(config.teacher_path, config.model.path)


def check_same_vocabulary(teacher_path: str | Path, model_path: str | Path) -> None:
    """Check that the policy's token ids mean the same to the teacher, as the likelihood judge requires.

    The teacher may have additional tokens, as post-trained models do.

    Raises:
        ModelError: the teacher lacks a token of the policy or has it under another id.
    """
    if not load_tokenizer(model_path).get_vocab().items() <= load_tokenizer(teacher_path).get_vocab().items():
        raise ModelError(
            f"teacher.path {teacher_path} and model.path {model_path} have different vocabularies, so the likelihood "
            "judge cannot score the policy's tokens; choose a teacher of the same family or teacher.judge=generative"
        )
