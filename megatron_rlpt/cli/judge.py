"""``rlpt judge`` and ``rlpt teacher``: judge workers, a quick look at verdicts, and servers of the teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from megatron_rlpt.cli.options import ConfigOption, Overrides, load, split_overrides
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.terminal import say

judge_app = typer.Typer(
    help="Judge workers, and a quick look at verdicts.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
teacher_app = typer.Typer(
    help="Servers of the teacher.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    """Around imports of what only some machines have installed."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'megatron-rlpt[workers]'") from None


@judge_app.command("serve")
def judge_serve(
    config: ConfigOption,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes to run.")] = 1,
    name: Annotated[
        str, typer.Option("--name", help="Name of the worker (several: NAME-1, ...); by default made up.")
    ] = "",
) -> None:
    """Judge groups out of the rollout buffer until SIGTERM; what is under way is finished first."""
    from megatron_rlpt.observe.log import quiet_libraries, setup_logging

    resolved = load(config, overrides)
    quiet_libraries()
    setup_logging()
    if workers > 1:
        from megatron_rlpt.judge_workers.supervisor import run_workers

        raise typer.Exit(run_workers(config, overrides or (), resolved, workers, name))
    with _packages():
        from megatron_rlpt.judge_workers.serve import run_worker
    run_worker(resolved, name)


@judge_app.command("try")
def judge_try(
    config: ConfigOption,
    prefix: Annotated[str, typer.Option("--prefix", help="Text that the candidates continue.")],
    candidates: Annotated[
        list[str], typer.Option("--candidate", metavar="TEXT", help="A candidate; give two or more.")
    ],
    overrides: Overrides = None,
    reference: Annotated[
        str, typer.Option("--reference", help="What the document says, for factuality; by default the first candidate.")
    ] = "",
    url: Annotated[str, typer.Option("--url", help="Server to ask, instead of those of the configuration.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Everything, machine-readable.")] = False,
) -> None:
    """Judge a few candidates and print scores, verdicts and replies."""
    from megatron_rlpt.observe.log import quiet_libraries

    resolved = load(config, overrides)
    quiet_libraries()
    with _packages():
        from megatron_rlpt.cli.judge_try import describe, require_score, try_judge
    group = try_judge(resolved, prefix, candidates, reference, url)
    say(describe(group, candidates, as_json))
    require_score(group)


@teacher_app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def teacher_serve(
    context: typer.Context,
    config: ConfigOption,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on and to announce; 0.0.0.0 is all, announced by host name."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 chooses a free one.")] = 0,
    weight: Annotated[float, typer.Option("--weight", help="Relative share of requests.")] = 1.0,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Most requests of a worker at once.")] = 32,
) -> None:
    """Serve the teacher with vLLM and announce it to judge workers.

    Arguments of the form section.key=value win over the file; all further ones go to vLLM's server.
    """
    from megatron_rlpt.observe.log import quiet_libraries, setup_logging

    overrides, extra = split_overrides(context.args)
    resolved = load(config, overrides)
    quiet_libraries()
    setup_logging()
    from megatron_rlpt.judge_workers.teacher_server import serve_teacher

    serve_teacher(resolved, host=host, port=port, weight=weight, concurrency=concurrency, extra=extra)
