"""``rlpt judge try``: the judge of a configuration on texts from the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import Config, EndpointConfig, RunIn, asks_teacher
from megatron_rlpt.errors import BufferUnavailableError, ConfigError, TeacherError
from megatron_rlpt.judge_workers.discovery import KIND, announced_endpoints
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.observe.terminal import one_line, plain
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

_PATIENCE = 5.0
"""Most seconds to try to reach the buffer; whoever looks at verdicts sits and waits."""


def try_judge(config: Config, prefix: str, candidates: Sequence[str], reference: str = "", url: str = "") -> Group:
    """Judge ``candidates`` as continuations of ``prefix``: with the servers that workers would ask, or in this process
    where the trainer or the workers judge by themselves.

    Args:
        config: names the judge, and the model whose tokenizer the texts go through.
        prefix: what the candidates continue.
        candidates: at least two.
        reference: what the document says itself, for factuality; empty is the first candidate.
        url: a server to ask instead of ``teacher.workers.endpoints`` and of those that are announced.

    Raises:
        ConfigError: fewer than two candidates, an empty text, or there is no server to ask.
        TeacherError: no server answers.
    """
    if len(candidates) < 2:
        raise ConfigError(f"--candidate is given {len(candidates)} time(s); give it at least twice, once per candidate")
    tokenizer = PolicyTokenizer(config.model.path)
    start = tuple(tokenizer.encode(prefix))
    tokens = [tuple(tokenizer.continue_with(start, text)) for text in candidates]
    if not start or any(tokenizer.is_blank(row) for row in tokens):
        raise ConfigError("--prefix and --candidate must not be empty or blank")
    suffix = tuple(tokenizer.continue_with(start, reference)) if reference else tokens[0]
    group = Group(
        Episode("try", start, suffix, "command line", "try", len(start)),
        tuple(Candidate(Source.ROLLOUT, row) for row in tokens),
    )
    if endpoints := [_at(config, url)] if url else _servers(config):
        return asyncio.run(_ask_servers(config, group, endpoints))
    from megatron_rlpt.teacher.build import build_judge

    return build_judge(resolve_dtypes(config), "cpu").judge([group])[0]


def _at(config: Config, url: str) -> EndpointConfig:
    """The server at ``url``, with its key and fields where the configuration has it."""
    known = (one for one in config.teacher.workers.endpoints if one.url.rstrip("/") == url.rstrip("/"))
    return next(known, EndpointConfig(url=url))


def _servers(config: Config) -> list[EndpointConfig]:
    """Those of the configuration, else those that are announced; none where no server is asked."""
    workers = config.teacher.workers
    if workers.endpoints or workers.own_model or config.teacher.run_in is not RunIn.workers or not asks_teacher(config):
        return workers.endpoints
    settings = replace(config.buffer, retry=min(config.buffer.retry, _PATIENCE))
    why = "none is announced in the rollout buffer"
    try:
        with contextlib.closing(open_buffer(replace(config, buffer=settings), create=False)) as buffer:
            endpoints = announced_endpoints([], buffer.announced(KIND), workers.key_env)
    except BufferUnavailableError as error:
        endpoints, why = [], str(error)
    if not endpoints:
        raise ConfigError(
            f"teacher.workers.endpoints is empty and no server is found ({why}); start one with rlpt teacher serve, or "
            "give --url"
        )
    return endpoints


async def _ask_servers(config: Config, group: Group, endpoints: Sequence[EndpointConfig]) -> Group:
    from megatron_rlpt.judge_workers.client.pool import TeacherPool
    from megatron_rlpt.judge_workers.serve import judge_of

    deadline = config.teacher.workers.request_deadline
    async with TeacherPool(endpoints, deadline) as pool:
        await pool.wait_until_ready(deadline)
        judge = judge_of(config, pool)
        return await judge.judge_group(group, pool)


def require_score(group: Group) -> None:
    """Raises TeacherError, with the most frequent reason and its first cause: every candidate failed."""
    reasons = Counter(reward.explained for reward in group.rewards if isinstance(reward, Failed))
    if reasons.total() == len(group.rewards):
        ((reason, count),) = reasons.most_common(1)
        raise TeacherError(f"no candidate has a score; {count} of {len(group.rewards)} failed with: {reason}")


def describe(group: Group, candidates: Sequence[str], as_json: bool = False) -> str:
    """Scores best first, with what the judge said; or all of it as JSON."""
    if as_json:
        return json.dumps([_record(text, reward) for text, reward in zip(candidates, group.rewards, strict=True)])
    ranked = sorted(
        enumerate(zip(candidates, group.rewards, strict=True)),
        key=lambda item: -item[1][1].value if isinstance(item[1][1], Reward) else float("inf"),
    )
    lines = []
    for index, (text, reward) in ranked:
        value = f"{reward.value:8.3f}" if isinstance(reward, Reward) else f"  failed ({one_line(reward.explained)})"
        lines.append(f"{value}  [{index}] {plain(text)}")
        lines += [f"            {line}" for line in _explanation(reward.detail)]
    return "\n".join(lines)


def _record(text: str, reward: Reward | Failed) -> dict[str, Any]:
    return {"text": text, "failed": isinstance(reward, Failed)} | asdict(reward)


def _explanation(detail: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {value:.3f}" for name, value in detail.items() if isinstance(value, float)]
    for name, axis in detail.get("axes", {}).items():
        lines.append(f"{name}: {axis['value']}")
        for vote in axis["votes"]:
            between = f" of [{vote['first']}] and [{vote['second']}]" if "first" in vote else ""
            reply = one_line(str(vote.get("reply") or ""))
            lines.append(f"  verdict{between}: {vote['verdict']}" + (f"; {reply}" if reply else ""))
    return lines
