"""``rlpt judge try``: judge texts from the command line with the judge of a configuration."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_rlpt.config import Config, EndpointConfig
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.judge_workers.asking import judge_on_servers, teacher_servers
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.plain_text import one_line, plain
from megatron_rlpt.teacher.judge_metrics import voted_axes
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source


def try_judge(config: Config, prefix: str, candidates: Sequence[str], reference: str = "", url: str = "") -> Group:
    """Judge ``candidates`` as continuations of ``prefix``.

    Uses the servers that workers would use, or a judge in this process where the run uses no server.

    Args:
        config: of the judge, and of the model whose tokenizer encodes the texts.
        prefix: text that the candidates continue.
        candidates: at least two texts.
        reference: text of the document, for factuality; if empty, the first candidate.
        url: server to use instead of ``teacher.workers.endpoints`` and the announced ones.

    Raises:
        ConfigError: fewer than two candidates, an empty text, or no server is known.
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
        return judge_on_servers(config, [group], endpoints)[0]
    from megatron_rlpt.teacher.build import build_judge

    return build_judge(resolve_dtypes(config), "cpu").judge([group])[0]


def _at(config: Config, url: str) -> EndpointConfig:
    """Return the server at ``url``, with its configured key and fields if it has any."""
    known = (one for one in config.teacher.workers.endpoints if one.url.rstrip("/") == url.rstrip("/"))
    return next(known, EndpointConfig(url=url))


def _servers(config: Config) -> list[EndpointConfig]:
    """Return the servers to ask; none if the judge asks nothing or its process has the model."""
    endpoints, why = teacher_servers(config)
    if why:
        raise ConfigError(
            f"teacher.workers.endpoints is empty and no server is found ({why}); start one with rlpt teacher serve, or "
            "give --url"
        )
    return endpoints


def require_score(group: Group) -> None:
    """Raise TeacherError if every candidate failed, with the most frequent reason and its first cause."""
    reasons = Counter(reward.explained for reward in group.rewards if isinstance(reward, Failed))
    if reasons.total() == len(group.rewards):
        ((reason, count),) = reasons.most_common(1)
        raise TeacherError(f"no candidate has a reward; {count} of {len(group.rewards)} failed with: {reason}")


def describe(group: Group, candidates: Sequence[str], as_json: bool = False) -> str:
    """Return the rewards, best first, with verdicts and replies; or everything as JSON."""
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
    for name, axis in voted_axes(detail).items():
        lines.append(f"{name}: {axis['value']}")
        for vote in axis["votes"]:
            between = f" of [{vote['first']}] and [{vote['second']}]" if "first" in vote else ""
            reply = one_line(str(vote.get("reply") or ""))
            lines.append(f"  verdict{between}: {vote['verdict']}" + (f"; {reply}" if reply else ""))
    return lines
