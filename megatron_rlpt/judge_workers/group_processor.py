"""The work of a judge worker on one group: rewrite (if enabled), then judge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_rlpt.teacher.generator import Ask, Reply, Request
from megatron_rlpt.teacher.judge import GroupJudge
from megatron_rlpt.teacher.rewriter import EpisodeRewriter
from megatron_rlpt.types import Candidate, Failed, Group, Source, derive_seed


@dataclass(frozen=True)
class GroupProcessor:
    """Rewrites and judges groups as configured."""

    judge: GroupJudge | None
    """None if the objective needs no rewards."""
    rewriter: EpisodeRewriter | None

    async def process(self, group: Group, ask: Ask, ask_rewriter: Ask) -> Group:
        """Return the group with its rewrite, inserted after the original, and with rewards.

        Args:
            group: to rewrite and judge.
            ask: asks the judge's model.
            ask_rewriter: asks the rewriter's model, which may be the same.
        """
        if self.rewriter is not None:
            rewrite = await self.rewriter.rewrite_one(group.episode, ask_rewriter)
            if isinstance(rewrite, Failed):
                group = replace(group, rewrite_failure=rewrite)
            else:
                group = replace(group, candidates=_with_rewrite(group.candidates, rewrite))
        return await self.judge.judge_group(group, ask) if self.judge else group


def _with_rewrite(candidates: tuple[Candidate, ...], rewrite: Candidate) -> tuple[Candidate, ...]:
    index = sum(candidate.source is Source.ORIGINAL for candidate in candidates)
    return (*candidates[:index], rewrite, *candidates[index:])


class CachingAsk:
    """An ``Ask`` for one group that stores every reply, so that no request is repeated after a worker crashes.

    Failures are not stored, because a retry may succeed.
    """

    def __init__(
        self,
        ask: Ask,
        teacher: str,
        known: Mapping[str, str],
        keep: Callable[[str, str], Any],
        again: int,
    ) -> None:
        """
        Args:
            ask: sends requests to the teacher.
            teacher: its name; replies of other teachers are not used.
            known: replies that were stored before, by key.
            keep: awaited with key and reply to store.
            again: number of failed attempts to judge the group; changes the seeds of its requests.
        """
        self._ask = ask
        self._teacher = teacher
        self._known = known
        self._keep = keep
        self._again = again
        self.failures: list[Failed] = []
        """Failed requests."""

    async def __call__(self, request: Request) -> Reply | Failed:
        """Return the stored reply, or send ``request`` and store its reply."""
        if self._again:
            request = replace(request, seed=derive_seed(request.seed, self._again))
        key = request_key(self._teacher, request)
        if (known := _read(self._known.get(key))) is not None:
            return known
        reply = await self._ask(request)
        if isinstance(reply, Failed):
            self.failures.append(reply)
        else:
            await self._keep(key, json.dumps(asdict(reply)))
        return reply


def request_key(teacher: str, request: Request) -> str:
    """Return a key of the teacher and everything that is sent to it."""
    text = json.dumps([teacher, asdict(request)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(text: str | None) -> Reply | None:
    """Parse a stored reply; None if there is none or it is invalid."""
    if text is None:
        return None
    try:
        fields = json.loads(text)
        alternatives = tuple((str(token), float(logprob)) for token, logprob in fields.get("alternatives", ()))
        reply = Reply(**fields | {"token_ids": tuple(fields["token_ids"]), "alternatives": alternatives})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    cached = () if reply.cached_tokens is None else (reply.cached_tokens,)
    numbers = (*reply.token_ids, reply.prompt_tokens, reply.answer_tokens, *cached)
    known = isinstance(reply.text, str) and isinstance(reply.finish_reason, str)
    return reply if known and all(type(number) is int for number in numbers) else None
