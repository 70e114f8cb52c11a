"""The teacher of a run, from its configuration: one engine for both roles, and nothing that is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config.schema import Config, JudgeName, ObjectiveName
from megatron_rlpt.errors import ModelError
from megatron_rlpt.teacher.generator import TextGenerator
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.rewriter import Rewriter


@dataclass(frozen=True)
class Teacher:
    """The teacher's roles; None where the run has no use for one."""

    judge: Judge | None
    rewriter: Rewriter | None


def build_teacher(config: Config, device: str) -> Teacher:
    """Load what the run needs: a judge if the objective compares candidates, a rewriter if rewrites are offered.

    Args:
        config: the run's configuration.
        device: torch device of the likelihood judge; the engine of a generative teacher places itself.

    Raises:
        ModelError: a model or tokenizer cannot be used, or the teacher cannot score the policy's tokens.
    """
    judged = config.objective.name in (ObjectiveName.rf_nll, ObjectiveName.online_dpo)
    prompted = judged and config.teacher.judge == JudgeName.generative
    generator = _build_generator(config) if prompted or config.candidates.rewrite else None
    judge = _build_judge(config, device, generator) if judged else None
    return Teacher(judge, _build_rewriter(config, generator) if generator and config.candidates.rewrite else None)


def _build_generator(config: Config) -> TextGenerator:
    from megatron_rlpt.teacher.vllm_generator import VllmGenerator

    return VllmGenerator(config.teacher_path, config.teacher.max_context, config.teacher.kv_cache_gib)


def _build_judge(config: Config, device: str, generator: TextGenerator | None) -> Judge:
    if config.teacher.judge == JudgeName.generative:
        from megatron_rlpt.teacher.generative import GenerativeJudge

        assert generator is not None
        decode = TokenizerText(config.model.path).decode
        return GenerativeJudge(generator, decode, config.teacher.generative, config.run.seed)
    from megatron_rlpt.teacher.likelihood import LikelihoodJudge

    if Path(config.teacher_path).resolve() != Path(config.model.path).resolve():
        check_same_vocabulary(config.teacher_path, config.model.path)
    return LikelihoodJudge(config.teacher_path, config.teacher.likelihood, device)


def _build_rewriter(config: Config, generator: TextGenerator) -> Rewriter:
    text = TokenizerText(config.model.path)
    return Rewriter(
        generator, text.encode, text.decode, config.teacher.rewriter, config.data.suffix_length, config.run.seed
    )


class TokenizerText:
    """The policy's tokenizer as the teacher needs it: text without special tokens, both ways."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError when the folder holds no tokenizer that can be loaded."""
        self._tokenizer = _load_tokenizer(path)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``; special tokens are left out, spaces are left alone."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def check_same_vocabulary(teacher_path: str | Path, model_path: str | Path) -> None:
    """The likelihood judge scores the policy's token ids, so they have to mean the same to the teacher.

    Raises:
        ModelError: the vocabularies differ.
    """
    if _load_tokenizer(teacher_path).get_vocab() != _load_tokenizer(model_path).get_vocab():
        raise ModelError(
            f"teacher.path {teacher_path} and model.path {model_path} have different vocabularies, so the likelihood "
            "judge cannot score the policy's tokens; choose a teacher of the same family or teacher.judge=generative"
        )


def _load_tokenizer(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ModelError(f"no tokenizer in {path}; it needs to be a local Hugging Face folder")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
