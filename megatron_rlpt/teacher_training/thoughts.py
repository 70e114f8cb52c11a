"""Thoughts to stand between a prefix and its suffix: written by a world, or by the teacher.

The teacher answers on the servers of ``teacher.workers.endpoints``, if there are any, else in this process from
``teacher.path``, and is sampled as a rewriter is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rlpt.config import Config, PromptLength, Role, model_of
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.observe import get_logger
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.teacher.build import start_generator
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.teacher.judge import most_frequent
from megatron_rlpt.teacher.prompts import build_prompt
from megatron_rlpt.teacher.thinking import TAG, without_thought
from megatron_rlpt.teacher_training.teacher_answers import TeacherAnswers
from megatron_rlpt.teacher_training.thinking_examples import Piece
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Failed, derive_seed
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.thinking import plan_of

_log = get_logger(__name__)


def thoughts_of_world(world: World, pieces: Sequence[Piece]) -> list[str | Failed]:
    """Return the plan of every piece; a failure where its suffix states nothing."""
    plans = (plan_of(world, one.prefix, one.suffix) for one in pieces)
    return [plan or Failed("the suffix states nothing") for plan in plans]


def thoughts_of_teacher(
    config: Config, pieces: Sequence[Piece], length: PromptLength, seed: int, answers: Path
) -> list[str | Failed]:
    """Ask the teacher for the thought of every piece.

    Args:
        config: names the model or its servers, and sampling.
        pieces: prefixes with their suffixes.
        length: of the prompts.
        seed: of codes and sampling.
        answers: folder in which answers of servers are kept.

    Raises:
        ConfigError: no model and no server is named.
        TeacherError: no server answers, or more thoughts failed than ``teacher.max_failure_rate`` allows.
        ModelError: the model cannot be used.
    """
    requests = [_request(config, one, length, seed) for one in pieces]
    thoughts = [one if isinstance(one, Failed) else read_thought(one) for one in _replies(config, requests, answers)]
    if failed := [one for one in thoughts if isinstance(one, Failed)]:
        if len(failed) > config.teacher.max_failure_rate * len(thoughts):
            raise TeacherError(
                f"{len(failed)} of {len(thoughts)} thoughts failed, more than teacher.max_failure_rate = "
                f"{config.teacher.max_failure_rate:g} allows; most frequent: {most_frequent(failed)}"
            )
        _log.warning("thoughts failed; their suffixes are left out", failed=len(failed), reasons=most_frequent(failed))
    return thoughts


def _replies(config: Config, requests: Sequence[Request], answers: Path) -> list[Reply | Failed]:
    teacher = config.teacher
    if teacher.workers.endpoints:
        return TeacherAnswers(config, PolicyTokenizer(config.model.path), answers, config.run.seed).replies(requests)
    if not teacher.path:
        raise ConfigError(
            "teacher.path and teacher.workers.endpoints are empty; name a model or servers that write thoughts, or "
            "give a --world"
        )
    config = resolve_dtypes(config)
    return start_generator(config, model_of(config, Role.judge), Ranks()).generate(requests)


def _request(config: Config, piece: Piece, length: PromptLength, seed: int) -> Request:
    fence = derive_seed(seed, piece.id)
    prompt = build_prompt("think", fence, length=length, prefix=piece.prefix, passage=piece.suffix)
    return Request(
        prompt=(Message("user", prompt.text),),
        seed=derive_seed(seed, piece.id, "think"),
        max_tokens=config.teacher.generative.max_tokens,
        temperature=config.teacher.rewriter.temperature,
        top_p=config.teacher.rewriter.top_p,
        episode=piece.id,
    )


def read_thought(reply: Reply) -> str | Failed:
    """Return the thought in a reply, in one line; what the model thought about it before is left out."""
    if reply.finish_reason == "length":
        return Failed("thought cut off by max_tokens", {"reply": reply.text})
    text = without_thought(reply.text)
    thought = " ".join((text or "").split())
    if not thought:
        return Failed("no thought", {"reply": reply.text})
    return Failed("thought with tags of a thought", {"reply": reply.text}) if TAG.search(thought) else thought
