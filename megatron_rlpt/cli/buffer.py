"""``rlpt buffer``: inspect and operate the rollout buffer of a run. Needs neither torch nor the model of the run."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TextIO

import typer

from megatron_rlpt.buffer.protocol import Entry, RolloutBuffer
from megatron_rlpt.cli.options import OptionalConfig, Overrides, load
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.files import open_atomically
from megatron_rlpt.observe.terminal import say
from megatron_rlpt.plain_text import one_line, plain
from megatron_rlpt.types import Failed

_PATIENCE = 5.0
"""Longest seconds to retry while the store cannot be reached, because a user is waiting."""
_POLL = 1.0
"""Seconds between two reads of ``tail --follow``."""

buffer_app = typer.Typer(
    name="buffer",
    help="Inspect and operate the rollout buffer of a run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Url = Annotated[
    str | None,
    typer.Option("--url", help="Instead of --config: sqlite:///path, redis://host:port/database or rediss://."),
]
Name = Annotated[str | None, typer.Option("--name", help="With --url: name of the buffer.")]
PasswordFile = Annotated[
    str,
    typer.Option(
        "--password-file", metavar="FILE", help="With --url: file of mode 0600; default: RLPT_BUFFER_PASSWORD."
    ),
]


@buffer_app.command()
def stats(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    url: Url = None,
    name: Name = None,
    password_file: PasswordFile = "",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Count groups by state; list workers and endpoints."""
    with _opened(config, overrides, url, name, password_file) as buffer:
        counts = dataclasses.asdict(buffer.stats())
        there = {"workers": buffer.announced("worker"), "endpoints": buffer.announced("endpoint")}
    if as_json:
        print(json.dumps({**counts, **there}))
        return
    oldest = "" if counts["oldest"] is None else f"{counts['oldest']:.0f} s"
    rows = [(key, str(value)) for key, value in {**counts, "oldest": oldest}.items()]
    rows += [
        (kind, f"{who}  {value}") for kind, found in there.items() for who, value in found.items() or [("none", "")]
    ]
    for key, value in rows:
        say(f"{key:<14}{one_line(value)}".rstrip())


@buffer_app.command()
def tail(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    url: Url = None,
    name: Name = None,
    password_file: PasswordFile = "",
    last: Annotated[int, typer.Option("--last", "-n", min=1, metavar="N", help="Number of groups.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print changed and new groups until Ctrl-C.")] = False,
) -> None:
    """Print the last groups.

    Each line has number, state, attempts, worker, episode and rewards.
    """
    with _opened(config, overrides, url, name, password_file) as buffer:
        shown = {entry.sequence: _line(entry) for entry in deque(buffer.entries(), maxlen=last)}
        print(*shown.values(), sep="\n", end="\n" if shown else "", flush=True)
        first = min(shown, default=0)
        while follow:
            time.sleep(_POLL)
            now = {entry.sequence: _line(entry) for entry in buffer.entries(first)}
            for sequence, line in now.items():
                if shown.get(sequence) != line:
                    print(line, flush=True)
            shown = now


@buffer_app.command()
def drain(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    url: Url = None,
    name: Name = None,
    password_file: PasswordFile = "",
    off: Annotated[bool, typer.Option("--off", help="Hand out groups again.")] = False,
) -> None:
    """Stop handing out groups to workers.

    Results of leased groups are still accepted.
    """
    with _opened(config, overrides, url, name, password_file) as buffer:
        buffer.drain(not off)
        leased = buffer.stats().leased
    print("workers are given groups again" if off else f"workers are given no more groups; {leased} are leased")


@buffer_app.command()
def requeue(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    url: Url = None,
    name: Name = None,
    password_file: PasswordFile = "",
    numbers: Annotated[
        list[int] | None, typer.Option("--number", "-n", metavar="N", help="Number of a dead group; may be repeated.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All dead groups.")] = False,
) -> None:
    """Queue dead groups again, with all attempts restored.

    Groups that the trainer has taken stay as they are. Without --number and --all, print the dead-letter list.
    """
    if numbers and every:
        raise ConfigError("--all and --number are both given; give only one")
    with _opened(config, overrides, url, name, password_file) as buffer:
        if numbers or every:
            print(f"{buffer.requeue(None if every else numbers)} groups queued again")
            return
        for letter in buffer.dead():
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(letter.time))
            line = f"{letter.sequence:>8}  {when}  {letter.episode}  attempts {letter.attempts}  {letter.reason}"
            say(" ".join(line.splitlines()))


@buffer_app.command()
def export(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    url: Url = None,
    name: Name = None,
    password_file: PasswordFile = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="File to write; default: standard output.")
    ] = None,
) -> None:
    """Write all groups as JSON lines.

    Each line has tokens, log-probabilities, rewards and the replies of the teacher.
    """
    with _opened(config, overrides, url, name, password_file) as buffer:
        if out is None:
            _write(buffer, sys.stdout)
            return
        try:
            with open_atomically(out) as handle:
                count = _write(buffer, handle)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    print(f"wrote {count} groups to {out}")


@contextlib.contextmanager
def _opened(
    config: Path | None, overrides: list[str] | None, url: str | None, name: str | None, password_file: str
) -> Iterator[RolloutBuffer]:
    """Open the existing buffer that the options name.

    Raises:
        ConfigError: the options name no buffer or two.
    """
    from megatron_rlpt.buffer.open import open_buffer, open_url

    if config is not None and url is None and name is None and not password_file:
        resolved = load(config, overrides)
        settings = dataclasses.replace(resolved.buffer, retry=min(resolved.buffer.retry, _PATIENCE))
        buffer = open_buffer(dataclasses.replace(resolved, buffer=settings), create=False)
    elif config is None and url is not None and name is not None and not overrides:
        buffer = open_url(url, name, password_file=password_file, retry=_PATIENCE, create=False)
    else:
        raise ConfigError(
            "name one buffer with --config FILE [section.key=value ...] or --url URL --name NAME [--password-file FILE]"
        )
    try:
        yield buffer
    finally:
        buffer.close()


def _line(entry: Entry) -> str:
    rewards = ", ".join(
        f"{candidate.source.value} failed ({reward.explained})"
        if isinstance(reward, Failed)
        else f"{candidate.source.value} {reward.value:.3f}"
        for candidate, reward in zip(entry.group.candidates, entry.group.rewards, strict=False)
    )
    if entry.group.rewrite_failure:
        rewards = ", ".join(filter(None, (rewards, f"rewrite failed ({entry.group.rewrite_failure.explained})")))
    who = f"  {entry.worker}" if entry.worker else ""
    line = f"{entry.sequence:>8}  {entry.state:<8}  attempts {entry.attempts}{who}  {entry.group.episode.id}  {rewards}"
    return plain(" ".join(line.splitlines())).rstrip()


def _write(buffer: RolloutBuffer, handle: TextIO) -> int:
    """Write all groups as JSON lines and return their number."""
    from megatron_rlpt.observe.jsonl import finite

    count = 0
    for entry in buffer.entries():
        record = {
            "sequence": entry.sequence,
            "state": entry.state,
            "attempts": entry.attempts,
            "worker": entry.worker,
            **dataclasses.asdict(entry.group),
            "replies": buffer.recall(entry.sequence),
        }
        # Escape to ASCII: replies may hold lone surrogates, which UTF-8 cannot encode.
        handle.write(json.dumps(finite(record), allow_nan=False, default=_base64) + "\n")
        count += 1
    return count


def _base64(data: bytes) -> str:
    """Return the expert numbers of a rollout as text."""
    return base64.b64encode(data).decode("ascii")
